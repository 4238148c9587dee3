"""Low-rank adapters of the routed experts.

Legend: R routed rows grouped by expert, D hidden, F expert hidden (this rank's slice), L experts of this rank, E
experts, K inner and N outer dimension of a projection, r rank, P expert-tensor-parallel ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.lora_layers import AdaptedLayer
from moe.counter_rng import key
from moe.expert_dropout import Dropout
from ops.adapted_experts import Adapted, Factors
from parallel import batch_context
from parallel.collectives import GatherSequence
from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class ExpertFactors(nn.Module):
    """A [L, K, r] and B [L, r, N] of a projection of every expert.

    The factor on the side of F is sharded as the weight is. Every expert-tensor-parallel rank needs the other one
    whole, while the gradients that the ranks compute of it are partial sums: it is stored sharded over D, gathered for
    the forward pass, and its gradient is reduce-scattered.
    """

    def __init__(self, layer: AdaptedLayer, rank: int, dtype: torch.dtype, groups: Groups):
        super().__init__()
        self.layer, self.etp = layer, groups.etp
        local, ranks = layer.experts // groups.ep.size(), groups.etp.size()
        self.a = nn.Parameter(torch.empty(local, layer.inner // ranks, rank, dtype=dtype))
        self.b = nn.Parameter(torch.empty(local, rank, layer.outer // ranks, dtype=dtype))
        for factor, dim, std in ((self.a, 1, (3 * layer.inner) ** -0.5), (self.b, 2, 0.0)):
            set_sharding(factor, (0, groups.ep), (dim, groups.etp), std=std, per_expert=True)
            mark(factor, allreduce=False)  # as the experts' weights

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B as this rank multiplies them. It is a forward pass for Megatron-Core, which waits in a hook of the
        module until its parameters are gathered (parallel.overlap_param_gather)."""
        if self.etp.size() == 1:
            return self.a, self.b
        if self.layer.sharded == "outer":
            return self._whole(self.a, 1), self.b
        return self.a, self._whole(self.b, 2)

    def _whole(self, factor: Tensor, dim: int) -> Tensor:
        return GatherSequence.apply(factor.transpose(0, dim).contiguous(), self.etp).transpose(0, dim)


class ExpertAdapters(nn.ModuleDict):
    """The adapters of the experts of a layer: some of gate, up and down."""

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        *,
        rank: int,
        scale: float,
        dropout: float,
        seed: int,
        gated: bool,
        dtype: torch.dtype,
        groups: Groups,
    ):
        """gated: whether the experts have a gate projection before that up."""
        found = {layer.name.rpartition(".")[2]: ExpertFactors(layer, rank, dtype, groups) for layer in layers}
        super().__init__(found)
        self.scale, self.dropout, self.seed, self.etp = scale, dropout, seed, groups.etp
        self.into = ("gate", "up") if gated else ("up",)

    def factors(self) -> list[tuple[str, ExpertFactors]]:
        """By name of the projection."""
        return [(part, factors) for part, factors in self.items() if isinstance(factors, ExpertFactors)]

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each projection, as this rank multiplies them."""
        return {part: factors() for part, factors in self.factors()}

    def started(
        self, adapted: Adapted, names_R: Tensor | None, tensors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> "StartedAdapters":
        """Those of one forward pass, with A and B of its experts."""
        batch_ctx = batch_context.current()
        dropouts: dict[str, Dropout] = {}
        if self.dropout and names_R is not None and batch_ctx is not None:
            for part, factors in self.factors():
                named = key(self.seed, "adapter dropout", batch_ctx.step, factors.layer.name)
                dropouts[part] = Dropout(self.dropout, named, names_R, factors.layer.inner)
        return StartedAdapters(self, adapted, dropouts, tensors)


@dataclass(frozen=True)
class StartedAdapters:
    """The adapters in a forward pass."""

    adapters: ExpertAdapters
    adapted: Adapted
    dropouts: dict[str, Dropout]
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """A and B."""

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """A and B of each part, to be passed to `run`, which may be given some experts' pieces of them."""
        return tuple(tensor for pair in self.tensors.values() for tensor in pair)

    def run(
        self,
        x_RD: Tensor,
        counts: Sequence[int],
        w_in: Tensor,
        w_out: Tensor,
        activation: str,
        b_in: Tensor | None,
        keep_RF: Tensor | None,
        rows: slice,
        *factors: Tensor,
    ) -> Tensor:
        """ops.adapted_experts.Adapted of some rows."""
        found = {}
        for index, part in enumerate(self.tensors):
            a_LKr, b_LrN = factors[2 * index : 2 * index + 2]
            found[part] = Factors(a_LKr, b_LrN, self.adapters.scale, self._keep(part, rows, x_RD.dtype))
        into = [found.get(part) for part in self.adapters.into]
        return self.adapted(x_RD, counts, w_in, w_out, activation, b_in, keep_RF, into, found.get("down"))

    def _keep(self, part: str, rows: slice, dtype: torch.dtype) -> Tensor | None:
        if part not in self.dropouts:
            return None
        etp = self.adapters.etp
        index, ranks = (etp.rank(), etp.size()) if part == "down" else (0, 1)
        return self.dropouts[part].factors(rows, index, ranks, dtype)
