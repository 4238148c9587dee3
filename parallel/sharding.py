"""How a parameter of the model is sharded over the ranks. Initialization, checkpoints and parameter counts all read the
same description.

A *logical parameter* is the whole parameter, as one rank alone would hold it.
"""

import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Matrices:
    """The matrices of a hidden layer that a logical parameter, or each expert of one, consists of."""

    blocks: tuple[int, ...] = ()
    """Sizes of the blocks of several matrices that take turns along a dimension. Empty: the parameter is one matrix."""
    dim: int = 0
    """The dimension of the blocks."""
    are_heads: bool = False
    """Whether they are queries, keys and values, which can also be taken for one matrix."""

    def views(self, whole: torch.Tensor, split_heads: bool = True) -> list[torch.Tensor]:
        """Views [..., columns] of a logical parameter (of one expert), one for each matrix. All dimensions but the last
        are its rows."""
        if not self.blocks or (self.are_heads and not split_heads):
            return [whole]
        turns = whole.unflatten(self.dim, (-1, sum(self.blocks)))
        return list(turns.split(self.blocks, self.dim + 1))


@dataclass(frozen=True)
class Sharding:
    """Which shard of a logical parameter this rank holds, and how the logical parameter is initialized."""

    sharded_dims: tuple[tuple[int, dist.ProcessGroup], ...] = ()
    """(dim, group): this dimension is sharded evenly over the ranks of the group."""
    replicas: tuple[dist.ProcessGroup, ...] = ()
    """Groups, besides the data-parallel ones, whose ranks all hold the same shard."""
    std: float | None = None
    """Standard deviation of the initial values; None: ones."""
    per_expert: bool = False
    """Whether dimension 0 counts experts. Each expert is then initialized from its own seed."""
    alias: str | None = None
    """Name of the logical parameter that this one is a copy of (tied embeddings on two pipeline stages)."""
    is_state: bool = False
    """Whether the values are set by a rule, not by a gradient. Where a checkpoint lacks them, the initial values are
    used: they leave the meaning of the other weights unchanged."""
    matrices: Matrices | None = None
    """None: embeddings, the output layer, routers, norms and biases."""

    def shard_index_and_count(self, dim: int) -> tuple[int, int]:
        """(index of this rank's shard, number of shards) along a dimension."""
        for sharded_dim, group in self.sharded_dims:
            if sharded_dim == dim:
                return group.rank(), group.size()
        return 0, 1

    def logical_shape(self, local: torch.Size) -> tuple[int, ...]:
        """The shape of the logical parameter, given the shape of this rank's shard."""
        return tuple(n * self.shard_index_and_count(dim)[1] for dim, n in enumerate(local))

    def index_steps(self, local: torch.Size) -> list[tuple[int, int, int]]:
        """(inner, skipped, first), to be applied in order: `index += index // inner * skipped + first` leads from an
        index in this rank's flattened shard to the one in the flattened logical parameter."""
        steps, sizes = [], [*local]
        for dim, group in sorted(self.sharded_dims, key=lambda sharded: -sharded[0]):
            shard, shards, inner = group.rank(), group.size(), math.prod(sizes[dim:])
            skipped = inner * (shards - 1) if math.prod(sizes[:dim]) > 1 else 0
            steps.append((inner, skipped, shard * inner))
            sizes[dim] *= shards
        return steps

    def is_first_replica(self) -> bool:
        """Whether this rank is the first of those that hold the same shard, data parallelism aside."""
        return self.alias is None and all(group.rank() == 0 for group in self.replicas)

    def bounds(self, local: torch.Size) -> list[tuple[int, int]]:
        """(start, end) of this rank's shard along every dimension of the logical parameter, given the shape of the
        shard."""
        starts = [n * self.shard_index_and_count(dim)[0] for dim, n in enumerate(local)]
        return [(start, start + n) for start, n in zip(starts, local, strict=True)]


class Marks(TypedDict, total=False):
    """What Megatron-Core, and the optimizer, read of a parameter beside its values."""

    sequence_parallel: bool
    """Whether its gradient is summed over the tensor-parallel group, whose ranks see different tokens."""
    allreduce: bool
    """False: its gradient is reduced over the expert-data-parallel group."""
    no_decay: bool
    """Whether it is left out of the weight decay, as norms and biases are by their shape."""
    role: str
    """router or expert: which of optim.router_lr_scale and optim.expert_lr_scale applies to it."""
    shared: bool
    """Whether it is a copy, which does not count in the gradient norm."""
    shared_embedding: bool
    """Whether another stage has the embedding too, so that it gets a bucket of its own."""
    tensor_model_parallel: bool
    """Whether every tensor-parallel rank's shard counts in the gradient norm, and not only that of rank 0."""
    partition_dim: int
    partition_stride: int
    main_grad: torch.Tensor
    """Where its gradients of a step are added up, in Megatron-Core's buckets."""
    grad_added_to_main_grad: bool
    """Whether the gradient that autograd returns was added there already, and has no meaning."""
    zero_out_wgrad: bool
    """Whether a layer that adds its gradient there returns zeros, since autograd sums them with that of another."""


def mark(parameter: nn.Parameter, **marks: Unpack[Marks]) -> None:
    """Sets attributes of a parameter that are read elsewhere."""
    for name, value in marks.items():
        setattr(parameter, name, value)


def set_sharding(
    parameter: nn.Parameter | None,
    *sharded_dims: tuple[int, dist.ProcessGroup],
    replicas: tuple[dist.ProcessGroup, ...] = (),
    std: float | None = None,
    per_expert: bool = False,
    alias: str | None = None,
    is_state: bool = False,
    matrices: Matrices | None = None,
) -> nn.Parameter:
    """Sets `parameter.sharding` and returns the parameter. The other arguments are the fields of `Sharding`.

    Args:
        parameter: not None, which Megatron-Core's linear layers declare for one that is made without a weight.
    """
    assert parameter is not None
    sharding = Sharding(sharded_dims, replicas, std, per_expert, alias, is_state, matrices)
    parameter.sharding = sharding  # pyright: ignore[reportAttributeAccessIssue]
    if sharded_dims:
        mark(parameter, tensor_model_parallel=True, partition_dim=sharded_dims[-1][0], partition_stride=1)
    return parameter


def sharding_of(parameter: nn.Parameter) -> Sharding:
    """What set_sharding has set."""
    return parameter.sharding  # pyright: ignore[reportAttributeAccessIssue]


def logical_name(name: str, parameter: nn.Parameter) -> str:
    """The name of the logical parameter. Module paths are the same on all ranks; an alias has the name of its
    original."""
    return sharding_of(parameter).alias or name
