"""The settings of a command by their dotted keys, and suggestions for mistyped ones."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, get_type_hints

from conf.schema import OPTIMIZERS

_NO_FP8_PARAMETERS = (
    "parameters are kept and gathered in bf16, not in FP8; the nearest is precision=fp8 fp8.kernels=te, by which they "
    "are quantized once a step"
)
_OPTIMIZER = f"the optimizer is chosen by optim.name: {' or '.join(OPTIMIZERS)}"
NOT_OFFERED: dict[str, str] = {
    **dict.fromkeys(("fp8_param_gather", "fp8_param", "fp8.param_gather"), _NO_FP8_PARAMETERS),
    **dict.fromkeys(("optim.kind", "optim.type", "optim.optimizer", "optimizer"), _OPTIMIZER),
    **dict.fromkeys(("evaluate.during", "eval.tasks"), "eval_tasks.tasks are evaluated every eval_tasks.every steps"),
}
"""Keys, or last parts of keys, that users of other trainers may look for and no setting here is like: what to say."""


def setting_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """The dotted key of every setting and section of a dataclass, with its type."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= setting_types(hint, f"{prefix}{name}.")
    return found


def nearest_settings(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown key: suggests optim.lr for `lr`, model.moe.top_k for `model.moe.topk`."""
    known = list(dict.fromkeys(known))
    section, _, name = key.rpartition(".")
    if name in NOT_OFFERED or key in NOT_OFFERED:
        return NOT_OFFERED.get(key) or NOT_OFFERED[name]

    def similarity(one: str, other: str) -> float:
        part = len(one) > 2 and one in other.split("_")  # heads -> num_attention_heads
        return max(difflib.SequenceMatcher(None, one, other).ratio(), 0.85 * part)

    def near(candidate: str) -> float:
        """The similarity of the last parts, reduced if the sections before them are different."""
        other_section, _, other = candidate.rpartition(".")
        alike = not section or section == other_section or similarity(section, other_section) >= 0.6
        return similarity(name, other) if alike else 0.8 * similarity(name, other)

    # The last part of the key counts first, the sections before it break ties.
    ranked = sorted(known, key=lambda k: (near(k), similarity(key, k)), reverse=True)
    same_name = [candidate for candidate in ranked if candidate.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {' or '.join(same_name)}?"
    if near(ranked[0]) >= 0.7:
        return f"the nearest is {ranked[0]}"
    beside = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    return f"there are {', '.join(beside)}" if beside else "--help lists all"
