"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, section
2.1.1).

Legend: S sequence (this rank's slice), B batch, D hidden, H heads of this rank, L width of the compressed keys and
values, P rotated dimensions of a head.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import ModelConfig
from models.attention import CoreAttention
from models.kv_cache import LayerCache
from models.norm import RMSNorm
from models.rope import Rotary, softmax_scale
from ops.attention_pieces import Piece
from ops.cached_attention import cached_attention
from ops.implementations import DEFAULT_OPS, Ops
from ops.linear import LinearLayers, LinearSpec
from parallel.collectives import GatherSequence
from parallel.process_groups import Groups
from parallel.sharding import Matrices, mark, set_sharding

EPS = 1e-6
"""Of the norms of compressed vectors: in Transformers it does not follow rms_norm_eps."""


class LatentAttention(CoreAttention):
    """Keys and values of all heads are projected up from one compressed vector per token, and so are queries if
    q_lora_rank is set. A further key with the position is shared by all heads.

    Heads are sharded over tensor-parallel ranks. The projections to compressed vectors are replicated: with sequence
    parallelism each rank computes those of its own tokens, and they are gathered instead of the hidden states.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Groups,
        ops: Ops = DEFAULT_OPS,
    ):
        super().__init__(groups, ops)
        assert model.kv_lora_rank is not None
        self.heads, self.interleave = model.num_attention_heads // groups.tp.size(), model.rope_interleave
        self.nope, self.rope, self.value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.rank, self.scale = model.kv_lora_rank, softmax_scale(model.rope_scaling)
        self.sequence_parallel = config.sequence_parallel
        how = False, config, groups.tp

        def column(inner: int, outer: int, norm: RMSNorm | None = None) -> nn.Module:
            spec = LinearSpec(inner, outer, *how)
            fused = None if norm is None else ops.norm_linear
            layer = ops.linear.column(spec) if norm is None or fused is None else fused(norm, spec)
            std = (model.init_scale / inner) ** 0.5
            set_sharding(layer.weight, (0, groups.tp), std=std, matrices=Matrices())
            return layer

        def norm(width: int) -> RMSNorm:
            dtype, split = config.params_dtype, config.sequence_parallel
            return RMSNorm(width, EPS, function=ops.rms_norm, dtype=dtype, sequence_parallel=split, groups=groups)

        self.norms_are_fused = ops.norm_linear is not None
        if model.q_lora_rank is None:
            self.q = column(model.hidden_size, model.query_width)
        else:
            self.q_down = replicated(ops.linear, model, LinearSpec(model.hidden_size, model.q_lora_rank, *how))
            self.q_norm = norm(model.q_lora_rank)
            self.q_up = column(model.q_lora_rank, model.query_width, self.q_norm)
        self.kv_down = replicated(ops.linear, model, LinearSpec(model.hidden_size, self.rank + self.rope, *how))
        self.kv_norm = norm(self.rank)
        self.kv_up = column(self.rank, model.num_attention_heads * (self.nope + self.value), self.kv_norm)
        self.out = ops.linear.row(LinearSpec(model.output_width, model.hidden_size, *how))
        std = (model.init_scale / model.output_width) ** 0.5
        set_sharding(self.out.weight, (1, groups.tp), std=std, matrices=Matrices())

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
        temperature_SB11: None, since every layer has a rotary embedding.
        cache: of the compressed vectors and shared keys of earlier tokens; None: x is the whole sequence.
        """
        assert temperature_SB11 is None
        q = self._queries(x_SBD)
        latent_SBL, position_SBP = self.kv_down(x_SBD)[0].split([self.rank, self.rope], -1)
        if not self.norms_are_fused:
            latent_SBL = self.kv_norm(latent_SBL)
        apply, interleave = self.ops.apply_rotary, self.interleave
        q = q.unflatten(-1, (self.heads, -1))
        q = Rotary.rotate(q, cos, sin, apply, first=self.nope, interleave=interleave, scale=self.scale)
        shared = self._to_all_heads(position_SBP).unsqueeze(2)
        shared = Rotary.rotate(shared, cos, sin, apply, interleave=interleave)
        if cache is not None:
            assert not self.norms_are_fused  # which is for training alone
            (seen_B1TW,) = cache.append(torch.cat([latent_SBL.unsqueeze(2), shared], -1).permute(1, 2, 0, 3))
            if cache.visible is not None:
                return self.out(self._attend_to_latents(q, seen_B1TW, cache))[0]
        kv = self.kv_up(latent_SBL)[0].unflatten(-1, (self.heads, -1))
        k_nope, v = kv.split([self.nope, self.value], -1)
        k = torch.cat([k_nope, shared.expand(-1, -1, self.heads, -1)], -1)
        return self.out(self.attend(q, k, v, pieces))[0]

    def _queries(self, x_SBD: Tensor) -> Tensor:
        if hasattr(self, "q"):
            return self.q(x_SBD)[0]
        compressed = self.q_down(x_SBD)[0]
        return self.q_up(compressed if self.norms_are_fused else self.q_norm(compressed))[0]

    def _attend_to_latents(self, q_SBHN: Tensor, seen_B1TW: Tensor, cache: LayerCache) -> Tensor:
        """[S, B, H * M]. Keys and values of earlier tokens are not projected up: the projection is applied to the
        queries and to what they attend to (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), so that a head's key is the
        compressed vector and the shared key, W wide, and its value the former."""
        assert cache.visible is not None

        def absorb() -> tuple[Tensor, ...]:
            # The layer's answer to the unit vectors is its weight, whatever computes its products.
            unit_L1L = torch.eye(self.rank, dtype=seen_B1TW.dtype, device=seen_B1TW.device).unsqueeze(1)
            up_LHE = self.kv_up(unit_L1L)[0].view(self.rank, self.heads, -1)
            keys, values = up_LHE.split([self.nope, self.value], -1)
            return keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous()

        keys_HNL, values_HLM = cache.derived(absorb)
        q_nope, q_rope = q_SBHN.split([self.nope, self.rope], -1)
        s, b = q_SBHN.shape[:2]
        compressed = torch.bmm(q_nope.permute(2, 0, 1, 3).flatten(1, 2), keys_HNL).unflatten(1, (s, b))
        q_BHSW = torch.cat([compressed.permute(2, 0, 1, 3), q_rope.permute(1, 2, 0, 3)], -1)
        scale = (self.nope + self.rope) ** -0.5
        out_BHSW = cached_attention(q_BHSW, seen_B1TW, seen_B1TW, cache.visible.mask_B1ST, scale=scale)
        latents = out_BHSW[..., : self.rank].permute(1, 2, 0, 3).flatten(1, 2)  # [H, S * B, L]
        return torch.bmm(latents, values_HLM).unflatten(1, (s, b)).permute(1, 2, 0, 3).flatten(2)

    def _to_all_heads(self, position_SBP: Tensor) -> Tensor:
        """The shared key of this rank's whole slice of the sequence. Its gradient is the sum over tensor-parallel
        ranks, since each has other heads."""
        if self.sequence_parallel:
            return GatherSequence.apply(position_SBP, self.tp)
        return tp.copy_to_tensor_model_parallel_region(position_SBP, group=self.tp)


def replicated(linear: LinearLayers, model: ModelConfig, spec: LinearSpec) -> Any:
    """A projection that every tensor-parallel rank computes for its tokens, which returns (output, None)."""
    layer = linear.replicated(spec)
    std = (model.init_scale / spec.inner) ** 0.5
    set_sharding(layer.weight, replicas=(spec.group,), std=std, matrices=Matrices())
    # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
    mark(layer.weight, sequence_parallel=spec.config.sequence_parallel)
    return layer
