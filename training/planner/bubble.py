"""The pipeline bubble: how long stages idle in a step under the schedules that there are."""

from collections.abc import Sequence

MOST_CHUNKS = 8
"""Per stage, of the schedules that are compared."""


def bubble(stages: Sequence[float], vpp: int = 1) -> float:
    """Seconds that the slowest stage idles: while the first micro-batch comes to it and the gradients of the last one
    go on from it. With 1F1B those are one micro-batch on each other stage, so that a step takes (m - 1) max + sum;
    interleaved, a chunk on each (Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Exact for stages that are alike
    or of which the last is slowest, otherwise at most that.

    Args:
        stages: seconds of a micro-batch, forward and backward, on each stage.
    """
    return (sum(stages) - max(stages)) / vpp


def by_schedule(stages: Sequence[float], layers: int) -> dict[str, float]:
    """The bubble of 1F1B, and of the interleaved schedule with each number of chunks per stage that has a layer in
    every chunk.

    Args:
        layers: of the model.
    """
    if len(stages) == 1:
        return {}
    chunks = [n for n in range(2, MOST_CHUNKS + 1) if layers % (len(stages) * n) == 0]
    return {"1F1B": bubble(stages)} | {f"interleaved, vpp={n}": bubble(stages, n) for n in chunks}
