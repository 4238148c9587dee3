"""Muon's update, which needs whole matrices, of parameters that are sharded: over the data-parallel ranks by the
distributed optimizer, and over the tensor-parallel ranks by the model.

Every rank adds the gradients to the momentum of its own shards. A matrix is then gathered on one rank, its owner, which
computes the direction and sends each rank the part that it updates its weights with. No matrix is computed twice, and
each is computed whole: the update is the same under every layout. The owner is the data-parallel rank that holds most
of the matrix already, so that only matrices on the border between two shards travel between data-parallel ranks
(arXiv:2502.16982, section 2.3, gathers them on all ranks that hold a part); over the tensor-parallel ranks ownership
takes turns.

Legend: N elements of this rank's shard of a unit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.muon import replace_by_directions
from parallel.sharding import Matrices, sharding_of

ROUND = 2**26
"""Elements of the matrices that a rank computes at once, which bounds temporary memory."""
Shards = dict[nn.Parameter, tuple[int, int]]
"""Start and end of this rank's shard of each flattened parameter of which it has one."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A parameter, or one expert of a parameter: what is gathered on one rank."""

    parameter: nn.Parameter
    first: int
    """Index of its first element in the flattened parameter of this rank."""
    shape: tuple[int, ...]
    """On this rank; the same on all."""
    cut_dim: int | None
    """The dimension sharded over the tensor-parallel ranks; None: each holds all of it."""
    matrices: Matrices
    ranges: dict[int, tuple[int, int]]
    """Start and end, relative to `first`, of what each data-parallel rank holds."""
    owner: tuple[int, int]
    """Its data-parallel rank, its tensor-parallel rank."""


@dataclass(frozen=True)
class _Part:
    """What a rank of a group holds of a unit that a rank of this group owns."""

    unit: Unit
    rank: int
    owner: int
    size: int
    """In elements."""


class _Exchange:
    """Parts of units on their way to the owners, or from them, within a group. All its ranks call this together."""

    def __init__(self, parts: list[_Part], group: dist.ProcessGroup, like: Tensor):
        """Args:
        parts: the same, in the same order, on all ranks.
        like: an empty tensor of the type and on the device of what is sent.
        """
        ranks, self._me = range(group.size()), group.rank()
        self._group, self._like = group, like
        self._crosses = any(part.rank != part.owner for part in parts)
        self._held = [[part for part in parts if (part.rank, part.owner) == (self._me, r)] for r in ranks]
        self._owned = [[part for part in parts if (part.rank, part.owner) == (r, self._me)] for r in ranks]

    def gather(self, give: Callable[[_Part], Tensor]) -> list[tuple[_Part, Tensor]]:
        """On an owner, the flat parts that all ranks hold of its units."""
        return self._run(self._held, self._owned, give)

    def scatter(self, give: Callable[[_Part], Tensor]) -> list[tuple[_Part, Tensor]]:
        """The flat parts of this rank, from the owners."""
        return self._run(self._owned, self._held, give)

    def _run(
        self, sending: list[list[_Part]], receiving: list[list[_Part]], give: Callable[[_Part], Tensor]
    ) -> list[tuple[_Part, Tensor]]:
        got = [(part, give(part).flatten()) for part in sending[self._me]]
        if not self._crosses:
            return got
        there = [[] if r == self._me else parts for r, parts in enumerate(sending)]
        here = [[] if r == self._me else parts for r, parts in enumerate(receiving)]
        counts = [[sum(part.size for part in parts) for parts in way] for way in (here, there)]
        sent = torch.cat([self._like, *(give(part).flatten() for parts in there for part in parts)])
        received = self._like.new_empty(sum(counts[0]))
        dist.all_to_all_single(received, sent, *counts, group=self._group)
        parts = [part for parts in here for part in parts]
        return got + list(zip(parts, received.split([part.size for part in parts]), strict=True))


class WholeMatrices:
    """The matrices of one pair of groups: those of experts, or all others."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shards: Shards,
        data: dist.ProcessGroup,
        tensor: dist.ProcessGroup,
        *,
        split_heads: bool,
    ):
        """Args:
        parameters: the same on all ranks of both groups, which call this together.
        data: the ranks that hold the same shard of a logical parameter.
        tensor: the ranks that together hold a logical parameter.
        split_heads: optim.muon_split_qkv.
        """
        self._rounds: list[_Round] = []
        if parameters:
            units = units_of(parameters, shards, data, tensor)
            # Jordan et al. compute in bf16; CPUs, and parameters in fp32, in fp32.
            device, dtype = parameters[0].device, parameters[0].dtype
            like = torch.empty(0, dtype=torch.float32 if device.type == "cpu" else dtype, device=device)
            rounds = rounds_of(units, tensor.size())
            self._rounds = [_Round(some, data, tensor, like, split_heads) for some in rounds]

    @torch.no_grad()
    def step(self, momentum: Callable[..., Tensor], apply: Callable[..., None]) -> None:
        """Updates this rank's shards. All ranks of both groups call this together.

        Args:
            momentum: (parameter, start, end in this rank's flattened parameter) -> the momentum [N] that the direction
                is computed from, a new tensor.
            apply: (parameter, start, end, direction [N]) updates the weights.
        """
        for units in self._rounds:
            units.step(momentum, apply)


class _Round:
    """Units that are computed at the same time."""

    def __init__(
        self,
        units: list[Unit],
        data: dist.ProcessGroup,
        tensor: dist.ProcessGroup,
        like: Tensor,
        split_heads: bool,
    ):
        self._like, self._ranks, self._split = like, tensor.size(), split_heads
        # A unit that all tensor-parallel ranks hold is gathered on its owner alone.
        sent = [unit for unit in units if unit.cut_dim is not None or unit.owner[1] == tensor.rank()]
        mine = [unit for unit in units if unit.owner[0] == data.rank()]

        def over_data(units: list[Unit]) -> _Exchange:
            spans = [(unit, rank, end - start) for unit in units for rank, (start, end) in unit.ranges.items()]
            return _Exchange([_Part(u, rank, u.owner[0], size) for u, rank, size in spans], data, like)

        def over_tensor(whole: bool) -> _Exchange:
            """whole: also to ranks that hold all of a unit."""
            pairs = [(u, r) for u in mine for r in range(tensor.size())]
            pairs = [(u, r) for u, r in pairs if whole or u.cut_dim is not None or r == u.owner[1]]
            return _Exchange([_Part(u, r, u.owner[1], math.prod(u.shape)) for u, r in pairs], tensor, like)

        self._data_in, self._data_out = over_data(sent), over_data(units)
        self._tensor_in, self._tensor_out = over_tensor(False), over_tensor(True)

    def step(self, momentum: Callable[..., Tensor], apply: Callable[..., None]) -> None:
        def held(part: _Part) -> Tensor:
            return momentum(part.unit.parameter, *_range(part)).to(self._like.dtype)

        shards = self._assemble(self._data_in.gather(held))
        wholes = self._join(self._tensor_in.gather(lambda part: shards[part.unit]))
        views = [view for unit, whole in wholes.items() for view in unit.matrices.views(whole, self._split)]
        replace_by_directions(views)
        shards = {part.unit: x for part, x in self._tensor_out.scatter(lambda part: self._cut(part, wholes))}
        for part, direction in self._data_out.scatter(lambda part: shards[part.unit][slice(*_own_range(part))]):
            apply(part.unit.parameter, *_range(part), direction)

    def _assemble(self, parts: list[tuple[_Part, Tensor]]) -> dict[Unit, Tensor]:
        """This rank's shards of units, flat, from what the data-parallel ranks hold of them."""
        shards: dict[Unit, Tensor] = {}
        for part, x in parts:
            size = math.prod(part.unit.shape)
            if part.size == size:
                shards[part.unit] = x
                continue
            shard = shards.setdefault(part.unit, self._like.new_empty(size))
            shard[slice(*_own_range(part))] = x
        return shards

    def _join(self, parts: list[tuple[_Part, Tensor]]) -> dict[Unit, Tensor]:
        """Logical units, from their tensor-parallel shards."""
        wholes: dict[Unit, Tensor] = {}
        for part, x in parts:
            unit = part.unit
            if unit.cut_dim is None or self._ranks == 1:
                wholes[unit] = x.view(unit.shape)
                continue
            shape = [n * self._ranks if dim == unit.cut_dim else n for dim, n in enumerate(unit.shape)]
            whole = wholes.setdefault(unit, self._like.new_empty(shape))
            whole.chunk(self._ranks, unit.cut_dim)[part.rank].copy_(x.view(unit.shape))
        return wholes

    def _cut(self, part: _Part, wholes: dict[Unit, Tensor]) -> Tensor:
        """A tensor-parallel rank's shard of a logical unit."""
        whole, dim = wholes[part.unit], part.unit.cut_dim
        return whole if dim is None else whole.chunk(self._ranks, dim)[part.rank]


def _own_range(part: _Part) -> tuple[int, int]:
    """In the unit."""
    return part.unit.ranges[part.rank]


def _range(part: _Part) -> tuple[int, int]:
    """In the flattened parameter."""
    start, end = _own_range(part)
    return part.unit.first + start, part.unit.first + end


def units_of(
    parameters: Sequence[nn.Parameter], shards: Shards, data: dist.ProcessGroup, tensor: dist.ProcessGroup
) -> list[Unit]:
    """The units of some parameters, in the same order on all ranks of both groups, which call this together."""
    everyone: list[Any] = [None] * data.size()
    dist.all_gather_object(everyone, [shards.get(p, (0, 0)) for p in parameters], group=data)
    units: list[Unit] = []
    load = {(d, t): 0 for d in range(data.size()) for t in range(tensor.size())}
    for index, parameter in enumerate(parameters):
        held = {rank: spans[index] for rank, spans in enumerate(everyone) if spans[index][0] < spans[index][1]}
        matrices = sharding_of(parameter).matrices
        assert matrices is not None
        for first, shape, cut in _pieces(parameter, tensor):
            size = math.prod(shape)
            spans = {rank: (max(0, start - first), min(size, end - first)) for rank, (start, end) in held.items()}
            ranges = {rank: span for rank, span in spans.items() if span[0] < span[1]}
            most = max(ranges, key=lambda rank: ranges[rank][1] - ranges[rank][0])
            owner = min(((most, t) for t in range(tensor.size())), key=load.__getitem__)
            load[owner] += size
            units.append(Unit(parameter, first, shape, cut, matrices, ranges, owner))
    return units


def _pieces(parameter: nn.Parameter, tensor: dist.ProcessGroup) -> Iterator[tuple[int, tuple[int, ...], int | None]]:
    """(first element, shape, dimension sharded over the tensor-parallel ranks) of each expert, or of the parameter."""
    shape = tuple(parameter.shape)
    cut = next((dim for dim, group in sharding_of(parameter).sharded_dims if group is tensor), None)
    if not sharding_of(parameter).per_expert:
        yield 0, shape, cut
        return
    for expert in range(shape[0]):
        yield expert * math.prod(shape[1:]), shape[1:], None if cut is None else cut - 1


def rounds_of(units: Sequence[Unit], tensor_size: int) -> list[list[Unit]]:
    """The units in rounds in which no rank computes more than ROUND elements, or one unit. An owner takes units of one
    shape together."""
    rounds: list[list[Unit]] = []
    for owner in sorted({unit.owner for unit in units}):
        at, taken = 0, 0
        for unit in sorted((u for u in units if u.owner == owner), key=lambda u: u.shape):
            whole = math.prod(unit.shape) * (1 if unit.cut_dim is None else tensor_size)
            if taken and taken + whole > ROUND:
                at, taken = at + 1, 0
            taken += whole
            rounds += [[] for _ in range(at + 1 - len(rounds))]
            rounds[at].append(unit)
    return rounds
