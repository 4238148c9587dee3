"""Rules for data=blend, its parts and its stages."""

import difflib
import math
from collections.abc import Iterator, Sequence

from conf.config_view import ConfigView, Violation, format_value
from conf.extensions import registered, takes_files
from conf.schema import DATA_KINDS, BlendPart

_ALONE = ("blend", "preference")
"""Kinds of data that cannot be part of a blend."""


def part_names(parts: Sequence[BlendPart]) -> list[str]:
    """The name of each part in the metrics."""
    return [part.name or f"{number}_{part.kind}" for number, part in enumerate(parts)]


def blend_rules(cfg: ConfigView) -> Iterator[Violation]:
    if cfg["data.kind"] != "blend":
        return
    if not cfg["data.blend"]:
        example = "data.blend=[{weight: 1, kind: stdlib}, {weight: 2, kind: text, files: [PATH]}]"
        yield Violation("data=blend needs data.blend", f"it has no parts; for example '{example}'")
    kinds = [kind for kind in dict.fromkeys((*DATA_KINDS, *registered("data.kind"))) if kind not in _ALONE]
    for index, part in enumerate(cfg["data.blend"]):
        name = f"data.blend[{index}]"
        if part.epochs is None and not 0 < part.weight < math.inf:
            yield Violation(f"{name}.weight > 0", f"it is {part.weight:g}; nearest: weight: 1")
        if part.kind not in kinds:
            nearest = difflib.get_close_matches(part.kind, kinds, n=1, cutoff=0.0)[0]
            actual = f"it is {part.kind}; nearest: kind: {nearest}"
            if part.kind == "preference":
                actual = (
                    "it is preference, for another objective; nearest: data=preference in a run of its own, with "
                    "checkpoint.load set to the run on the blend"
                )
            yield Violation(f"{name}.kind is one of {', '.join(kinds)}", actual)
        elif part.files and not takes_files(part.kind):
            yield Violation(
                f"{name}.files has an effect only with kind: text, megatron or chat", f"kind is {part.kind}"
            )
        elif takes_files(part.kind) and not part.files:
            yield Violation(f"{name}.files is needed with kind: {part.kind}", "there are none: files: [PATH]")
    yield from _names(cfg)
    yield from _epochs(cfg)
    yield from _stages(cfg)


def _names(cfg: ConfigView) -> Iterator[Violation]:
    names = part_names(cfg["data.blend"])
    for index, name in enumerate(names):
        rule = f"data.blend[{index}].name"
        if name in names[:index]:
            yield Violation(f"{rule} is no other part's", f"it is {name}; nearest: name: {name}_{index}")
        elif not all(letter.isalnum() or letter in "_.-" for letter in name):
            safe = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in name)
            yield Violation(f"{rule} is made of letters, digits, _ . and -", f"it is {name!r}; nearest: name: {safe}")


def _epochs(cfg: ConfigView) -> Iterator[Violation]:
    parts, stages = cfg["data.blend"], cfg["data.stages"]
    for index, part in enumerate(parts):
        name = f"data.blend[{index}]"
        if part.epochs is None:
            continue
        if not 0 < part.epochs < math.inf:
            yield Violation(f"{name}.epochs > 0", f"it is {part.epochs:g}; nearest: epochs: 1")
        if not 0 <= part.weight < math.inf:
            yield Violation(f"{name}.weight >= 0", f"it is {part.weight:g}; nearest: weight: 1")
        elif not stages and part.weight != 1:
            actual = f"it is {part.weight:g}, and its samples are spread evenly over the run; nearest: weight: 1"
            yield Violation(f"{name}.weight with epochs has an effect only with data.stages", actual)
        elif not any([part.weight, *(stage.weights[index] for stage in stages if index < len(stage.weights))]):
            yield Violation(f"{name}.weight > 0 in data.blend or in a stage", "it is 0 in all; nearest: weight: 1")
    if not parts or any(part.epochs is None for part in parts):
        return
    if stages:
        actual = "all have epochs; nearest: a weight instead of epochs for one of them, or data.stages=[]"
        yield Violation("data.stages needs a part of data.blend with a weight, for what the others leave", actual)
    if cfg["data.temperature"] is not None:
        actual = "all have epochs"
        yield Violation(
            "data.temperature needs a part of data.blend with a weight", actual, {"data.temperature": [None]}
        )


def _stages(cfg: ConfigView) -> Iterator[Violation]:
    parts, steps, before = len(cfg["data.blend"]), cfg["train.steps"], 1
    with_weights = [i for i, part in enumerate(cfg["data.blend"]) if part.epochs is None]
    for index, stage in enumerate(cfg["data.stages"]):
        name = f"data.stages[{index}]"
        if stage.step <= before:
            what = f"of data.stages[{index - 1}]" if index else "which data.blend's own weights begin with"
            yield Violation(f"{name}.step > {before}, {what}", f"it is {stage.step}; nearest: step: {before + 1}")
        elif stage.step > steps:
            yield Violation(f"{name}.step <= train.steps={steps}", f"it is {stage.step} and would be ignored")
        before = max(before, stage.step)
        if len(stage.weights) != parts:
            rule = f"{name}.weights has a weight for each of the {parts} parts of data.blend"
            yield Violation(rule, f"it has {len(stage.weights)}")
        elif not all(0 <= weight < math.inf for weight in stage.weights) or not any(stage.weights):
            rule = f"{name}.weights are 0 or more, and one of them is more"
            yield Violation(rule, f"they are {format_value(stage.weights)}")
        elif with_weights and not any(stage.weights[i] for i in with_weights):
            rule = f"a part without epochs has a weight above 0 in {name}, for what the others leave"
            yield Violation(rule, f"the weights are {format_value(stage.weights)}")
