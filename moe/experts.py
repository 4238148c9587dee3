"""The experts of a sparse layer.

Legend: R routed rows grouped by expert, D hidden, F expert hidden (this rank's slice), L experts of this rank,
G 2 for gated activations, else 1.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.schema import ModelConfig
from moe.chunked_experts import InPieces
from moe.expert_dropout import Dropout
from moe.expert_lora import ExpertAdapters
from moe.expert_parts import ExpertWeights
from ops.experts import ExpertBackend, of_rows
from ops.permute import PermutedTokens
from parallel.activation_checkpoint import MATMUL_OPS, checkpointed
from parallel.process_groups import Groups
from parallel.sharding import Matrices, mark, set_sharding


class Experts(nn.Module):
    """This rank's experts: E is sharded over expert-parallel, F over expert-tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, *, backend: ExpertBackend, dtype: torch.dtype, groups: Groups):
        super().__init__()
        self.activation = model.activation_name
        self.backend = backend
        self.etp, self.ffn_hidden_size = groups.etp, model.expert_width
        self.chunk_rows = model.moe.expert_chunk_rows
        self.recompute = "activation" in model.recompute and not backend.recomputes_activation
        local, hidden = model.moe.num_experts // groups.ep.size(), model.hidden_size
        width, gates = model.expert_width // groups.etp.size(), input_projections(model.activation)
        self.w_in = nn.Parameter(torch.empty(local, hidden, gates, width, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(local, width, hidden, dtype=dtype))
        placed: list[tuple[nn.Parameter, int, float, Matrices | None]] = [
            (self.w_in, 3, (model.init_scale / hidden) ** 0.5, Matrices((1,) * gates, dim=1)),
            (self.w_out, 1, (model.init_scale / model.expert_width) ** 0.5, Matrices()),
        ]
        self.b_in: nn.Parameter | None = None
        self.b_out: nn.Parameter | None = None
        if model.moe.expert_bias:
            self.b_in = nn.Parameter(torch.empty(local, gates, width, dtype=dtype))
            # Sharded as well, though every rank's partial sum has all D columns: each rank adds its own columns, once.
            self.b_out = nn.Parameter(torch.empty(local, hidden // groups.etp.size(), dtype=dtype))
            placed += [(self.b_in, 2, 0.0, None), (self.b_out, 1, 0.0, None)]
            for bias in (self.b_in, self.b_out):
                mark(bias, no_decay=True)
            before = groups.etp.rank() * self.b_out.shape[1]
            self.columns = (before, hidden - before - self.b_out.shape[1])
            """Before and after those of b_out."""
        self.lora: ExpertAdapters | None = None
        """Low-rank adapters, which models.lora adds."""
        for weight, axis, std, matrices in placed:
            cut = (0, groups.ep), (axis, groups.etp)
            set_sharding(weight, *cut, std=std, per_expert=True, matrices=matrices)
            # Megatron-Core then reduces these over the expert-data-parallel group; needed at ep = 1 as well.
            mark(weight, allreduce=False, role="expert")

    def weights(self) -> ExpertWeights:
        """Those of all experts."""
        return ExpertWeights(self.w_in, self.w_out, self.b_in, self.b_out, self.lora.tensors() if self.lora else {})

    def forward(
        self,
        permuted: PermutedTokens,
        counts: Sequence[int],
        dropout: Dropout | None = None,
        names_R: Tensor | None = None,
        weights: ExpertWeights | None = None,
    ) -> Tensor:
        """Returns [R, D], partial sums over etp where F is sharded.

        Args:
            counts: rows of each expert.
            names_R: as Dropout.names_R, for the dropout of adapters; None: it is off.
            weights: of the experts whose rows these are; None: of all.
        """
        weights = weights or self.weights()
        in_pieces = self.chunk_rows is not None and len(permuted) > self.chunk_rows
        in_place = self.backend.permutes and not in_pieces and not permuted.padded and self.lora is None
        indices = (permuted.indices,) if in_place else ()
        lora = None
        if self.lora is not None:
            lora = self.lora.started(self.backend.adapted, names_R, weights.adapters)
        function: Callable[..., Tensor] = lora.run if lora else self.backend.run

        def run(rows: slice, x: Tensor, counts: Sequence[int], w_in: Tensor, w_out: Tensor, *more: Tensor) -> Tensor:
            keep = dropout and dropout.factors(rows, self.etp.rank(), self.etp.size(), x.dtype)
            b_in, factors = (None, more) if weights.b_in_LGF is None else (more[0], more[1:])
            further = (rows, *factors) if lora else indices
            run = partial(checkpointed, function, save_ops=MATMUL_OPS) if self.recompute else function
            return run(x, counts, w_in, w_out, self.activation, b_in, keep, *further)

        passed: tuple[Tensor, ...] = (weights.w_in_LDGF, weights.w_out_LFD)
        passed += () if weights.b_in_LGF is None else (weights.b_in_LGF,)
        passed += lora.factors if lora else ()
        x = permuted.x_TD if in_place else permuted.permute()
        if in_pieces:
            y_RD = InPieces.apply(run, self.chunk_rows, counts, x, *passed)
        else:
            y_RD = run(slice(None), x, counts, *passed)
        b_out_LD = weights.b_out_LD
        return y_RD if b_out_LD is None else y_RD + of_rows(F.pad(b_out_LD, self.columns), counts)
