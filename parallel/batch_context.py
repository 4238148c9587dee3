"""What every layer may know of the pass under way, handed down by the engine with the tokens.

Legend: B batch, S sequence.
"""

from dataclasses import dataclass

from torch import Tensor

TRAIN, EVALUATE, GENERATE = "train", "evaluate", "generate"


@dataclass(frozen=True)
class ForwardPass:
    """A micro-batch on its way through the model."""

    mode: str = TRAIN
    """Which capacity and which noise apply: train, evaluate, or generate (dropless)."""
    loss_scale: float = 1.0
    """What backward multiplies losses by that a layer computes by itself, to match the main loss."""
    step: int = 0
    micro_batch: int = 0
    """Of the global batch of that step, counted over all data-parallel ranks: with the step it names the draws of this
    pass, whatever the layout."""
    host_positions_BS: Tensor | None = None
    """Positions of the whole sequence in the host's memory, where documents are looked up; None: only the device has
    them."""
    padding_BS: Tensor | None = None
    """bool over this rank's slice of the sequence: True where there is no token. None: there is one everywhere."""


PLAIN = ForwardPass()
"""Training, with a loss that is not scaled."""
