"""Causal grouped-query attention with rotary positions, and the part of it that other kinds of attention share.

Legend: S sequence (this rank's slice), B batch, D hidden, H heads of this rank, G key/value groups of this rank, N
width of a head, M width of its values.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import ModelConfig
from models.kv_cache import LayerCache
from models.norm import RMSNorm
from models.qk_norm import norm_queries_and_keys, qk_layernorm
from models.rope import Rotary
from ops.attention_pieces import Piece
from ops.cached_attention import cached_attention
from ops.implementations import DEFAULT_OPS, Ops
from ops.linear import LinearSpec
from parallel.async_collectives import async_all_to_all, run_collective
from parallel.collectives import GatherSequence
from parallel.process_groups import Groups
from parallel.sharding import Matrices, mark, set_sharding


class CoreAttention(nn.Module):
    """Attention of queries to keys and values. Under context parallelism keys and values of the whole sequence are
    gathered, and queries exchanged so that every rank has as much to do; or ops.cp_attention does all of that."""

    def __init__(self, groups: Groups, ops: Ops = DEFAULT_OPS):
        super().__init__()
        self.tp, self.cp, self.ops = groups.tp, groups.cp, ops

    def attend(
        self,
        q_SBHN: Tensor,
        k_SBGN: Tensor,
        v_SBGM: Tensor,
        pieces: list[Piece] | None,
        sinks_H: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[S, B, H * M]. Kernels need values as wide as queries and keys: narrower ones (M < N) are padded with zeros.

        Args:
            pieces: from attention_pieces; with ops.cp_attention those of the whole sequence on one rank.
            sinks_H: logits of the heads' sinks (ops.varlen_attention.VarlenAttention); they need pieces.
            cache: of earlier tokens, to which keys and values are added; as wide as each other then.
        """
        if cache is not None:
            keys_BGTN, values_BGTN = cache.append(k_SBGN.permute(1, 2, 0, 3), v_SBGM.permute(1, 2, 0, 3))
            if cache.visible is not None:
                q_BHSN, mask = q_SBHN.permute(1, 2, 0, 3), cache.visible.mask_B1ST
                out_BHSN = cached_attention(
                    q_BHSN, keys_BGTN, values_BGTN, mask, scale=q_SBHN.shape[-1] ** -0.5, sinks_H=sinks_H
                )
                return out_BHSN.permute(2, 0, 1, 3).flatten(2)
        q, k, v, padding = q_SBHN, k_SBGN, v_SBGM, q_SBHN.shape[-1] - v_SBGM.shape[-1]
        if self.ops.cp_attention is not None:
            v = F.pad(v, (0, padding)) if padding else v
            out = self.ops.cp_attention(q, k, v, pieces, sinks_H)
            return (out[..., :-padding] if padding else out).flatten(2)
        if self.cp.size() > 1:
            k, v = GatherSequence.apply(k, self.cp), GatherSequence.apply(v, self.cp)
            q = self._swap_late_half(q)
        v = F.pad(v, (0, padding)) if padding else v
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        ops = self.ops
        attended = ops.causal_attention(q, k, v) if pieces is None else ops.varlen_attention(q, k, v, pieces, sinks_H)
        out = attended.permute(2, 0, 1, 3)
        out = out[..., :-padding] if padding else out
        if self.cp.size() > 1:
            out = self._swap_late_half(out)
        return out.flatten(2)

    def _swap_late_half(self, x_SBHN: Tensor) -> Tensor:
        """Exchanges the later half of this rank's slice with the rank opposite (see query_pieces)."""
        early, late = x_SBHN.chunk(2)
        opposite = self.cp.size() - 1 - self.cp.rank()
        rows = [len(late) if rank == opposite else 0 for rank in range(self.cp.size())]
        return torch.cat([early, run_collective(late, async_all_to_all(rows, rows, self.cp))])


class Attention(CoreAttention):
    """Grouped-query attention: projects, rotates and attends. Heads are sharded over tensor-parallel ranks."""

    ones_N: Tensor

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Groups,
        ops: Ops = DEFAULT_OPS,
        *,
        rope: bool = True,
        norm: RMSNorm | None = None,
    ):
        """Args:
        rope: whether the layer has a rotary embedding.
        norm: of the input, which is computed here together with the projections; None: the input is normalised.
        """
        super().__init__(groups, ops)
        ranks = groups.tp.size()
        self.rope, self.eps = rope, model.norm_eps
        self.width = model.head_width
        self.heads, self.groups = model.num_attention_heads // ranks, model.query_groups // ranks
        # Kernels multiply the products by head_width ** -0.5.
        multiplier = model.attention_multiplier
        self.scale = 1.0 if multiplier is None else multiplier * model.head_width**0.5
        self.clip, self.interleave = model.clip_qkv, model.rope_interleave
        # Rows per key/value group: its queries, their gates, its key, its value, as in Megatron-Core. So a
        # tensor-parallel slice is whole groups.
        spec = LinearSpec(model.hidden_size, model.qkv_width, model.attention_bias, config, groups.tp)
        if norm is None:
            self.qkv = ops.linear.column(spec)
        else:
            assert ops.norm_linear is not None
            self.qkv = ops.norm_linear(norm, spec)
        sizes = model.query_width, model.hidden_size
        self.out = ops.linear.row(LinearSpec(*sizes, model.attention_output_bias, config, groups.tp))
        queries, gates = (width // model.query_groups for width in (model.query_width, model.gate_width))
        self.parts = queries, gates, self.width, self.width
        self.full_norm, self.l2_norm = model.qk_norm == "full", model.qk_norm == "l2"
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if self.l2_norm:
            self.register_buffer("ones_N", torch.ones(self.width, dtype=config.params_dtype), persistent=False)
        elif model.qk_norm is not None:
            how = model, config.params_dtype, groups, ops.rms_norm
            self.q_layernorm, self.k_layernorm = (qk_layernorm(w, *how) for w in (model.query_width, model.key_width))
        self._set_shardings(model, sequence_parallel=config.sequence_parallel)
        self.sinks: nn.Parameter | None = None
        if model.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(self.heads, dtype=config.params_dtype))
            set_sharding(self.sinks, (0, groups.tp), std=0.0)

    def _set_shardings(self, model: ModelConfig, *, sequence_parallel: bool) -> None:
        queries = self.heads // self.groups * self.width
        heads = Matrices((queries, self.width, self.width), are_heads=True)
        std = (model.init_scale / model.hidden_size) ** 0.5
        set_sharding(self.qkv.weight, (0, self.tp), std=std, matrices=heads)
        if model.attention_bias:
            set_sharding(self.qkv.bias, (0, self.tp), std=0.0)
        std = (model.init_scale / model.query_width) ** 0.5
        set_sharding(self.out.weight, (1, self.tp), std=std, matrices=Matrices())
        if model.attention_output_bias:
            set_sharding(self.out.bias, replicas=(self.tp,), std=0.0)
            # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
            mark(self.out.bias, sequence_parallel=sequence_parallel)

    def forward(
        self,
        x_SBD: Tensor,
        cos: Tensor,
        sin: Tensor,
        pieces: list[Piece] | None,
        temperature_SB11: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Args:
        pieces: from attention_pieces.
        temperature_SB11: factor of the queries of a layer without rotary embedding; None: 1.
        cache: of earlier tokens; None: x is the whole sequence.
        """
        qkv, bias = self.qkv(x_SBD)
        qkv = qkv if bias is None else qkv + bias
        s, b, _ = qkv.shape
        q, gate, k, v = qkv.view(s, b, self.groups, -1).split(self.parts, -1)
        q = q.reshape(s, b, self.heads, self.width)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = norm_queries_and_keys(q, k, (self.q_layernorm, self.k_layernorm), self.full_norm, self.tp)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if self.rope:
            q, k = self._rotated(q, k, cos, sin)
        elif temperature_SB11 is not None or self.scale != 1:
            q = (q * (self.scale if temperature_SB11 is None else temperature_SB11 * self.scale)).to(q.dtype)
        attended = self.attend(q, k, v, pieces, self.sinks, cache)
        if self.parts[1]:
            gate_SBH_ = gate.reshape(s, b, self.heads, -1).sigmoid()  # [S, B, H, N], or 1 for N
            attended = (attended.unflatten(2, (self.heads, -1)) * gate_SBH_).flatten(2)
        y_SBD, bias = self.out(attended)
        return y_SBD if bias is None else y_SBD + bias

    def _rotated(self, q_SBHN: Tensor, k_SBGN: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, times their scale, and keys after the rotary embedding and the norm that follows it."""
        how, scale = (cos, sin, self.ops.apply_rotary), 1.0 if self.l2_norm else self.scale
        if scale == 1 and not torch.is_grad_enabled():  # together, which is half of what the host does for a token
            both = Rotary.rotate(torch.cat([q_SBHN, k_SBGN], 2), *how, interleave=self.interleave)
            q_SBHN, k_SBGN = both.split([self.heads, self.groups], 2)
            return (q_SBHN, k_SBGN) if not self.l2_norm else self._l2_normed(q_SBHN, k_SBGN)
        q_SBHN = Rotary.rotate(q_SBHN, *how, interleave=self.interleave, scale=scale)
        k_SBGN = Rotary.rotate(k_SBGN, *how, interleave=self.interleave)
        return (q_SBHN, k_SBGN) if not self.l2_norm else self._l2_normed(q_SBHN, k_SBGN)

    def _l2_normed(self, q_SBHN: Tensor, k_SBGN: Tensor) -> tuple[Tensor, Tensor]:
        norm, gain_N = self.ops.rms_norm, self.ones_N if self.scale == 1 else self.ones_N * self.scale
        return norm(q_SBHN, gain_N, self.eps), norm(k_SBGN, self.ones_N, self.eps)


def query_temperature(positions_SB: Tensor, model: ModelConfig) -> Tensor | None:
    """fp32 [S, B, 1, 1], the factor of queries in layers without rotary embedding (Llama 4; after arXiv:2501.19399,
    section 2); None: it is 1."""
    if model.attention_temperature is None:
        return None
    steps_SB = torch.floor((positions_SB + 1) / model.attention_temperature_tokens)
    return (1 + model.attention_temperature * torch.log1p(steps_SB))[..., None, None]
