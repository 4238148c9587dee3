"""Pipeline layouts as text (parallel.pp_layout), in the notation of Megatron-Core's pipeline_model_parallel_layout: E
is the embedding, t a layer, m a layer for multi-token prediction, L the output layer and the loss; | stands between
model chunks, x*n and (xy|)*n repeat, commas have no meaning."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from conf.config_view import ConfigView, Violation

KEY = "parallel.pp_layout"
_GROUP, _LETTER = re.compile(r"\(([^()]+)\)\*(\d{1,4})"), re.compile(r"([EtmL|])\*(\d{1,4})")


def distribute(layers: int, chunks: int) -> list[int]:
    """Layers per chunk, as even as possible, larger chunks first: 61 on 16 -> thirteen of 4 and three of 3."""
    return [layers // chunks + (i < layers % chunks) for i in range(chunks)]


def chunks_of(text: str) -> list[str]:
    """What each chunk holds, written out: "Et*2|(t|)*2mL" -> ["Ett", "t", "t", "mL"]. Other characters stay as they
    are."""
    text = "".join(text.replace(",", "").split())
    for repeated in (_GROUP, _LETTER):
        text = repeated.sub(lambda found: found[1] * int(found[2]), text)
    return text.split("|")


def layers_of(text: str) -> list[int]:
    """Number of layers of each chunk, without those for multi-token prediction."""
    return [chunk.count("t") for chunk in chunks_of(text)]


def written(layers: Sequence[int], mtp: int) -> str:
    """The layout with so many layers in each chunk."""
    chunks = [{0: "", 1: "t"}.get(n, f"t*{n}") for n in layers]
    chunks[0], chunks[-1] = f"E{chunks[0]}", f"{chunks[-1]}{ {0: '', 1: 'm'}.get(mtp, f'm*{mtp}') }L"
    return "|".join(chunks)


def text_rules(cfg: ConfigView, even: Sequence[int]) -> Iterator[Violation]:
    """Rules for a layout that is given.

    Args:
        even: layers of each chunk that would do, if there are enough.
    """
    chunks, layers, mtp = chunks_of(cfg[KEY]), cfg["model.num_layers"], cfg["model.mtp_num_layers"]
    suggestions: dict[str, Iterable[Any]] = {KEY: [written(even, mtp), None] if layers >= len(even) else [None]}
    whole = "".join(chunks)
    if cfg["parallel.pp_layers"] is not None:
        both: dict[str, Iterable[Any]] = {"parallel.pp_layers": [None], KEY: [None]}
        yield Violation(f"{KEY} excludes parallel.pp_layers", "both are given", both)
    elif unknown := sorted({*re.sub("[EtmL]", "", whole)}):
        yield Violation(
            f"{KEY} is made of E, t, m, L, | and repetitions x*n and (..)*n", f"it has {' '.join(unknown)}", suggestions
        )
    elif len(chunks) != len(even):
        what = "parallel.pp * parallel.vpp" if cfg["parallel.vpp"] else "parallel.pp"
        vpp, rest = divmod(len(chunks), cfg["parallel.pp"])
        others: dict[str, Iterable[Any]] = {"parallel.vpp": [None if vpp == 1 else vpp]} if vpp and not rest else {}
        yield Violation(f"{KEY} has {what} chunks", f"{len(chunks)} != {len(even)}", others | suggestions)
    elif not re.fullmatch("Et*m*L", whole):
        yield Violation(f"{KEY} has one E first, then every t, every m, and one L", f"it has {whole}", suggestions)
    elif "" in chunks:
        yield Violation(f"every chunk of {KEY} holds something", f"chunk {chunks.index('') + 1} is empty", suggestions)
    elif (given := whole.count("t")) != layers:
        numbers = suggestions | {"model.num_layers": [given]} if given else suggestions
        yield Violation(f"{KEY} has model.num_layers times t", f"{given} != {layers}", numbers)
    elif (given := whole.count("m")) != mtp:
        yield Violation(
            f"{KEY} has model.mtp_num_layers times m",
            f"{given} != {mtp}",
            suggestions | {"model.mtp_num_layers": [given]},
        )
    elif chunks[-1].count("m") != mtp:
        moved = written([chunk.count("t") for chunk in chunks if chunk.strip("m")], mtp)
        yield Violation(
            f"every m of {KEY} is in the last chunk, before L (it reads the embedding, and the output layer is there)",
            f"it is {cfg[KEY]}",
            {KEY: [moved, *suggestions[KEY]]},
        )
