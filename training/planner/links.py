"""How long collectives take: by their volume and the slowest link that they cross."""

from conf.schema import ClusterConfig
from parallel.layout import Layout

LINK_EFFICIENCY, NETWORK_EFFICIENCY = 0.75, 0.8
"""Share of the nominal bandwidth that large collectives reach within a node (NCCL's bus bandwidth on eight H100 is
about 340 of 450 GB/s) and between nodes (about 40 of 50 GB/s)."""
LATENCY, NETWORK_LATENCY = 15e-6, 30e-6
"""Seconds of a collective without data, within a node and between nodes."""


class Links:
    """The collectives of a layout on a cluster. Sizes are bytes, times seconds."""

    def __init__(self, layout: Layout, cluster: ClusterConfig):
        self._layout, self._cluster = layout, cluster
        self._link = (cluster.link_gb_per_s or float("inf")) * 1e9 * LINK_EFFICIENCY
        self._network = (cluster.network_gb_per_s or float("inf")) * 1e9 * NETWORK_EFFICIENCY
        sizes = {axis: getattr(layout, axis) for axis in ("tp", "cp", "dp", "etp", "ep", "edp", "pp")}
        inner = {"tp": 1, "cp": sizes["tp"], "dp": sizes["tp"] * sizes["cp"], "etp": 1, "ep": sizes["etp"]}
        inner |= {"edp": sizes["etp"] * sizes["ep"]}
        self._groups = {axis: self._group(sizes[axis], stride) for axis, stride in inner.items()}
        # The gradients of attention and dense layers are reduced over dp and cp together, which are adjacent, within an
        # optimizer instance; then over the instances.
        dense, experts = layout.optimizer_ranks
        self._groups["dp_cp"] = self._group(dense, sizes["tp"])
        self._groups["edp"] = self._group(experts, inner["edp"])
        self._groups["instances"] = self._group(layout.optimizer_instances, dense * sizes["tp"])

    def _group(self, size: int, stride: int) -> tuple[int, int]:
        """(ranks of a group, of them within one node); ranks of a group are `stride` apart."""
        return size, max(1, min(size, self._cluster.ranks_per_node // stride))

    def ring(self, axis: str, size: float) -> float:
        """An all-gather or a reduce-scatter of `size` bytes in all; an all-reduce takes twice as long. Rings leave a
        node through the network interfaces of all the group's ranks in it."""
        ranks, local = self._groups[axis]
        if ranks == 1:
            return 0.0
        if local >= ranks:
            return (ranks - 1) / ranks * size / self._link + LATENCY
        return (ranks - 1) / ranks * size / min(self._link, self._network * local) + NETWORK_LATENCY

    def all_to_all(self, axis: str, size: float) -> float:
        """Every rank sends `size` bytes, evenly to all ranks of the group."""
        ranks, local = self._groups[axis]
        if ranks == 1:
            return 0.0
        inside, outside = (local - 1) / ranks * size / self._link, (ranks - local) / ranks * size / self._network
        return max(inside, outside) + (LATENCY if local >= ranks else NETWORK_LATENCY)

    def dispatch(self, tokens: float, top_k: float, bytes_per_token: float) -> float:
        """DeepEP's dispatch or combine: a token crosses the network once for each node that has one of its experts, and
        within a node once for each rank (DeepSeek-V3, arXiv:2412.19437, section 3.2.2). Experts are drawn evenly."""
        ranks, local = self._groups["ep"]
        if ranks == 1:
            return 0.0
        nodes = ranks / local
        remote = (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)
        inside = (local - 1) * nodes * (1 - (1 - 1 / ranks) ** top_k)
        size = tokens * bytes_per_token
        latency = LATENCY if nodes == 1 else NETWORK_LATENCY
        return max(remote * size / self._network, inside * size / self._link) + latency

    def between_stages(self, size: float) -> float:
        """From a pipeline stage to the next one."""
        layout = self._layout
        inside = layout.world // layout.pp < self._cluster.ranks_per_node
        return size / (self._link if inside else self._network) + (LATENCY if inside else NETWORK_LATENCY)
