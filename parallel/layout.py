"""The parallel layout: degrees of parallelism, the ranks of each process group, and which groups should lie within a
node. Does not import torch: a login node describes a layout of thousands of ranks."""

import itertools
import math
from dataclasses import dataclass

from conf.pipeline_layout import layers_of
from conf.schema import ParallelConfig

GRIDS = {"attention": ("tp", "cp", "dp", "pp"), "experts": ("etp", "ep", "edp", "pp")}
"""The two grids over the same ranks, in Megatron-Core's order: along the first axis ranks are consecutive."""
AXES = ("tp", "cp", "dp", "etp", "ep", "edp", "pp")
SHARE_A_NODE = {
    "tp": "every layer waits for its collectives",
    "etp": "every sparse layer gathers rows over it",
    "ep": "every sparse layer waits for its all-to-all",
    "cp": "every layer gathers keys and values over it",
}
"""Groups that should lie within a node, by decreasing traffic. Data-parallel and pipeline groups may span nodes: their
communication is rare or overlapped."""
_ROWS = 16
"""Rows of the rank table; of a larger world the first and the last ranks are shown."""


def cache_unsupported_reason(*, cp: int, sequence_parallel: bool) -> str | None:
    """Why text generation under a layout has no key/value cache; None: it has one."""
    if cp > 1:
        return "cp shards a sequence over ranks, of which one would have each new token and the others nothing to do"
    if sequence_parallel:
        return "sequence_parallel shards the tokens of a pass over tp ranks, and a new token is alone in its pass"
    return None


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism over `world` ranks: (tp, cp, dp, pp) for attention and dense layers, (etp, ep, edp, pp)
    for experts."""

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    pp_layers: tuple[int, ...] | None = None
    """Number of layers of every pipeline chunk in the order of the model; None: the same in each. The first chunk has
    the embedding as well, the last the layers for multi-token prediction and the output layer."""
    optimizer_instances: int = 1
    """Groups of consecutive data-parallel ranks that each hold all gradient and optimizer shards."""

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> "Layout":
        """The layout of a validated configuration (conf/rules.py)."""
        p = parallel
        given = p.pp_layers if p.pp_layout is None else layers_of(p.pp_layout)
        layers = None if given is None else tuple(given)
        instances = p.optimizer_instances
        layout = cls(world, p.tp, p.pp, p.vpp or 1, p.cp, p.ep, p.etp, p.sequence_parallel, layers, instances)
        assert layout.dp * p.tp * p.pp * p.cp == world and layout.edp * p.etp * p.ep * p.pp == world, layout
        assert layout.dp % instances == 0 == layout.edp % instances, layout
        return layout

    @property
    def dp(self) -> int:
        """Data-parallel size of attention and dense layers."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def optimizer_ranks(self) -> tuple[int, int]:
        """Over how many ranks the gradients and the optimizer states are sharded: (of dense parameters, of experts)."""
        return self.dp * self.cp // self.optimizer_instances, self.edp // self.optimizer_instances

    def chunk_layers(self, chunk: int, num_layers: int) -> range:
        """The layers of a pipeline chunk. Chunks are numbered in the order of the model: stage s holds chunks s, s +
        pp, s + 2 pp, ..."""
        chunks = self.pp * self.vpp
        sizes = self.pp_layers or (num_layers // chunks,) * chunks
        assert len(sizes) == chunks and sum(sizes) == num_layers, (self, num_layers)
        first = sum(sizes[:chunk])
        return range(first, first + sizes[chunk])

    def strides(self, grid: str) -> dict[str, tuple[int, int]]:
        """(stride, size) of each axis of a grid."""
        sizes = [getattr(self, axis) for axis in GRIDS[grid]]
        return {axis: (math.prod(sizes[:i]), sizes[i]) for i, axis in enumerate(GRIDS[grid])}

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's coordinate on every axis of both grids."""
        axes = self.strides("attention") | self.strides("experts")
        return {axis: rank // stride % size for axis, (stride, size) in axes.items()}

    def group(self, rank: int, *axes: str) -> list[int]:
        """The ranks whose coordinates differ from this rank's only on the given axes of one grid, in rank order."""
        grid = self.strides(next(name for name, known in GRIDS.items() if set(axes) <= set(known)))
        first = rank - sum(rank // stride % size * stride for stride, size in (grid[axis] for axis in axes))
        steps = [range(0, stride * size, stride) for stride, size in (grid[axis] for axis in axes)]
        return sorted(first + sum(step) for step in itertools.product(*steps))

    def optimizer_group(self, rank: int, *axes: str) -> list[int]:
        """Of a data-parallel group, "cp" and "dp" or "edp", the ranks of this rank's optimizer instance: those that the
        shards of the optimizer are distributed over. The same position in it means the same shard."""
        ranks = self.group(rank, *axes)
        size = len(ranks) // self.optimizer_instances
        first = ranks.index(rank) // size * size
        return ranks[first : first + size]

    def optimizer_replicas(self, rank: int) -> list[int]:
        """The ranks that hold the same optimizer shards as this one, of one instance each. Those of experts too: an
        instance is a block of consecutive ranks of a pipeline stage on both grids."""
        ranks = self.group(rank, "cp", "dp")
        size = len(ranks) // self.optimizer_instances
        return ranks[ranks.index(rank) % size :: size]

    def nodes_of(self, axis: str, ranks_per_node: int) -> int:
        """The largest number of nodes that a group of an axis spans."""
        stride, size = (self.strides("attention") | self.strides("experts"))[axis]
        heads = (rank for rank in range(self.world) if rank // stride % size == 0)
        return max(len({(head + i * stride) // ranks_per_node for i in range(size)}) for head in heads)

    def describe(self) -> str:
        degrees = {"dp": self.dp, "tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep}
        degrees |= {"etp": self.etp, "optimizer_instances": self.optimizer_instances}
        shown = [f"{name}{n}" for name, n in degrees.items() if n > 1] or ["one rank"]
        runs = [(n, len([*same])) for n, same in itertools.groupby(self.pp_layers or ())]
        written = [f"{n}*{count}" if count > 4 else "+".join([str(n)] * count) for n, count in runs]
        uneven = f" (layers {'+'.join(written)})" if written else ""
        return " ".join(shown) + (" +sequence" if self.sequence_parallel else "") + uneven


def groups_across_nodes(layout: Layout, ranks_per_node: int) -> list[str]:
    """A sentence for each kind of group that should lie within a node and does not, by decreasing traffic."""
    strides = layout.strides("attention") | layout.strides("experts")
    found = []
    for axis, why in SHARE_A_NODE.items():
        (stride, size), nodes = strides[axis], layout.nodes_of(axis, ranks_per_node)
        if nodes > 1:
            found.append(
                f"a {axis} group lies within {stride * size} consecutive ranks, a node has {ranks_per_node}: "
                f"it spans {nodes} nodes, and {why}"
            )
    return found


def describe(layout: Layout, ranks_per_node: int) -> str:
    """A description of the layout in several lines: both grids, every kind of group with its size, number of nodes and
    an example, the rank table, and warnings about groups that should lie within a node.

    Args:
        ranks_per_node: GPUs per node, or ranks simulated on one machine.
    """
    world, nodes = layout.world, -(-layout.world // ranks_per_node)
    lines = [f"{world:,} ranks on {nodes:,} node{'s' if nodes > 1 else ''} of {ranks_per_node}: {layout.describe()}"]
    for grid, axes in GRIDS.items():
        lines.append(f"{grid:<9}  {' * '.join(f'{axis} {getattr(layout, axis)}' for axis in axes)} = {world:,}")
    lines += ["", "group   size  groups  nodes  example"]
    for axis in AXES:
        size = getattr(layout, axis)
        if size > 1:
            example = layout.group(0, axis)
            shown = " ".join(map(str, example[:8])) + (f" ... {example[-1]}" if size > 8 else "")
            nodes = layout.nodes_of(axis, ranks_per_node)
            lines.append(f"{axis:<6} {size:>5,} {world // size:>7,} {nodes:>6,}  {shown}")
    lines += [
        "",
        *rank_table(layout, ranks_per_node),
        *(f"warning: {c}" for c in groups_across_nodes(layout, ranks_per_node)),
    ]
    return "\n".join(lines)


def rank_table(layout: Layout, ranks_per_node: int) -> list[str]:
    """A row per rank: its node and its coordinates on both grids; of a large world the first and the last ranks."""
    rows = [f"{'rank':>7} {'node':>6}  {' '.join(f'{axis:>4}' for axis in AXES)}"]
    half = _ROWS // 2
    cut = layout.world > _ROWS
    for rank in [*range(half), *range(layout.world - half, layout.world)] if cut else range(layout.world):
        if cut and rank == layout.world - half:
            rows.append(f"{'...':>7}")
        index = layout.coordinates(rank)
        rows.append(f"{rank:>7,} {rank // ranks_per_node:>6,}  {' '.join(f'{index[axis]:>4}' for axis in AXES)}")
    return rows
