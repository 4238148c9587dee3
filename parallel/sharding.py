"""How a parameter of the model lies over the ranks. One description serves initialisation (draw the whole, keep this
rank's part), checkpoints (which box of the whole this rank writes or reads) and parameter counts."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Placement:
    """Where a rank's tensor lies in the logical parameter, and what the logical parameter is."""

    cuts: tuple[tuple[int, dist.ProcessGroup], ...] = ()
    """(axis, group): this axis is cut evenly over the ranks of the group."""
    copies: tuple[dist.ProcessGroup, ...] = ()
    """Groups, other than the data-parallel ones, whose ranks all hold the same part."""
    std: float | None = None
    """Standard deviation of the initial values; None: ones."""
    per_expert: bool = False
    """Axis 0 counts experts: each is drawn by its own key."""
    alias: str | None = None
    """The logical parameter that this one is a second copy of (tied embeddings on two pipeline stages)."""
    is_state: bool = False
    """Set by rule and not by gradient. Weights without it mean what they mean with its initial values, with which it
    starts where a checkpoint has none."""

    def offset_and_size(self, axis: int) -> tuple[int, int]:
        """(index of this rank's part, number of parts) along an axis."""
        for cut_axis, group in self.cuts:
            if cut_axis == axis:
                return group.rank(), group.size()
        return 0, 1

    def logical_shape(self, local: torch.Size) -> tuple[int, ...]:
        return tuple(n * self.offset_and_size(axis)[1] for axis, n in enumerate(local))

    def logical_index(self, local: torch.Size, start: int, end: int, device: torch.device) -> torch.Tensor:
        """int64 [end - start]: where elements of this rank's flattened tensor lie in the flattened logical one."""
        index, sizes = torch.arange(start, end, device=device), [*local]
        for axis, group in sorted(self.cuts, key=lambda cut: -cut[0]):
            part, parts, inner = group.rank(), group.size(), math.prod(sizes[axis:])
            if math.prod(sizes[:axis]) > 1:
                index += index // inner * (inner * (parts - 1))
            index += part * inner
            sizes[axis] *= parts
        return index

    def is_first_copy(self) -> bool:
        """Among ranks that hold the same part (data parallelism aside), is this the one that speaks for it?"""
        return self.alias is None and all(group.rank() == 0 for group in self.copies)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logical tensor, as a view."""
        for axis, group in self.cuts:
            whole = whole.chunk(group.size(), dim=axis)[group.rank()]
        return whole


def place(
    parameter: nn.Parameter,
    *cuts: tuple[int, dist.ProcessGroup],
    copies: tuple[dist.ProcessGroup, ...] = (),
    std: float | None = None,
    per_expert: bool = False,
    alias: str | None = None,
    is_state: bool = False,
) -> nn.Parameter:
    """Attaches a Placement to a parameter and returns the parameter."""
    parameter.placement = Placement(tuple(cuts), copies, std, per_expert, alias, is_state)
    if cuts:
        # Megatron-Core's own marks: every rank's part counts in the gradient norm. Without them only tensor-parallel
        # rank 0 would count.
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = cuts[-1][0], 1
    return parameter


def logical_name(name: str, parameter: nn.Parameter) -> str:
    """The parameter's name in the whole model: module paths are already global, aliases name their original."""
    return parameter.placement.alias or name
