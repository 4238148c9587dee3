"""Causal grouped-query attention with rotary positions.

Legend: S sequence (this rank's slice), B batch, D hidden, H heads of this rank, G key/value groups of this rank, N
width of a head.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from models.norm import RMSNorm
from models.qk_norm import norm_queries_and_keys, qk_layernorm
from models.varlen_attention import (
    Piece,
    Segment,
    VarlenAttention,
    joined_attention,
    masked_attention,
    varlen_attention,
)
from ops.cpp import build as native
from ops.registry import Candidate, Choice, Norm, select, torch_rms_norm
from parallel.async_collectives import async_all_to_all, run_collective
from parallel.chunked_ops import rows_at_once
from parallel.collectives import GatherSequence
from parallel.process_groups import Groups
from parallel.sharding import set_sharding

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, H, S, N], k and v [B, G, S, N]) -> [B, H, S, N]; a query sees the keys up to its own."""


Turn = Callable[..., Tensor]
"""The arguments and the result of `torch_turn`."""


def torch_turn(x_SBHN: Tensor, cos: Tensor, sin: Tensor, out_SBHN: Tensor, *, back: bool = False) -> Tensor:
    """Writes x turned by the angles, or back, into `out`, and returns it. cos, sin: fp32 [S, B, 1, N/2]."""
    sin = -sin if back else sin
    rows = rows_at_once(math.prod(x_SBHN.shape[1:]), x_SBHN.device)
    for x, c, s, out in zip(*(t.split(rows) for t in (x_SBHN, cos, sin, out_SBHN)), strict=True):
        (a, b), (first, second) = x.float().chunk(2, -1), out.chunk(2, -1)
        first.copy_((a * c).addcmul_(b, s, value=-1))
        second.copy_((b * c).addcmul_(a, s))
    return out_SBHN


def torch_attention(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
    gqa = q_BHSN.shape[1] != k_BGSN.shape[1]
    return F.scaled_dot_product_attention(q_BHSN, k_BGSN, v_BGSN, is_causal=True, enable_gqa=gqa)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), halves instead of interleaved pairs."""

    def __init__(self, width: int, theta: float, max_positions: int):
        super().__init__()
        angle = torch.outer(torch.arange(max_positions).float(), theta ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [S, B, 1, N/2], fp32, contiguous."""
        # What an index gives lies in memory as the index does, which may be a batch turned round.
        return tuple(table[positions_SB].unsqueeze(2).contiguous() for table in (self.cos, self.sin))

    @staticmethod
    def rotate(x_SBHN: Tensor, cos: Tensor, sin: Tensor, turn: Turn = torch_turn) -> Tensor:
        """In fp32 whatever the precision of x."""
        return _Rotate.apply(x_SBHN, cos, sin, turn)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of x for the backward pass, which turns the other way."""

    @staticmethod
    def forward(ctx, x_SBHN: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        s, b, h, n = x_SBHN.shape
        # In memory heads come before the sequence, as attention reads them: on a CPU it takes a tenth less time then.
        turned_SBHN = x_SBHN.new_empty((b, h, s, n)).permute(2, 0, 1, 3)
        return turn(x_SBHN, cos, sin, turned_SBHN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SBHN: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.turn(grad_SBHN, cos, sin, grad_SBHN.new_empty(grad_SBHN.shape), back=True), None, None, None


class Attention(nn.Module):
    """Projects, rotates and attends. Heads are cut over tensor-parallel ranks; under context parallelism keys and
    values of the whole sequence are gathered, and queries exchanged so that every rank has as much to do."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Groups,
        causal: CausalAttention = torch_attention,
        turn: Turn = torch_turn,
        varlen: VarlenAttention = joined_attention,
        norm: Norm = torch_rms_norm,
    ):
        """Args:
        causal: what attends where all tokens before a query are seen (choose_attention).
        turn: what rotates (choose_turn).
        varlen: what attends within documents, or to other ranks' keys (choose_varlen_attention).
        norm: which RMSNorm runs, for model.qk_norm (ops.registry.select_norm).
        """
        super().__init__()
        self.tp, self.cp, self.causal, self.turn, self.varlen = groups.tp, groups.cp, causal, turn, varlen
        ranks = groups.tp.size()
        self.width = model.head_width
        self.heads, self.groups = model.num_attention_heads // ranks, model.query_groups // ranks
        self.clip = model.clip_qkv
        linear = {"config": config, "init_method": None, "tp_group": groups.tp, "skip_bias_add": True}
        # Rows per key/value group: its queries, its key, its value. So a tensor-parallel slice is whole groups.
        self.qkv = tp.ColumnParallelLinear(
            model.hidden_size,
            model.query_width + 2 * model.key_width,
            gather_output=False,
            bias=model.attention_bias,
            **linear,
        )
        self.out = tp.RowParallelLinear(
            model.query_width,
            model.hidden_size,
            input_is_parallel=True,
            bias=False,
            **linear,
        )
        self.full_norm = model.qk_norm == "full"
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if model.qk_norm is not None:
            how = model, config.params_dtype, groups, norm
            self.q_layernorm, self.k_layernorm = (qk_layernorm(w, *how) for w in (model.query_width, model.key_width))
        set_sharding(self.qkv.weight, (0, groups.tp), std=(model.init_scale / model.hidden_size) ** 0.5)
        if model.attention_bias:
            set_sharding(self.qkv.bias, (0, groups.tp), std=0.0)
        set_sharding(self.out.weight, (1, groups.tp), std=(model.init_scale / model.query_width) ** 0.5)

    def forward(self, x_SBD: Tensor, cos: Tensor, sin: Tensor, pieces: list[Piece] | None) -> Tensor:
        """pieces: from attention_pieces."""
        qkv, bias = self.qkv(x_SBD)
        qkv = qkv if bias is None else qkv + bias
        s, b, _ = qkv.shape
        queries = self.heads // self.groups
        q, k, v = qkv.view(s, b, self.groups, -1).split([queries * self.width, self.width, self.width], -1)
        q = q.reshape(s, b, self.heads, self.width)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = norm_queries_and_keys(q, k, (self.q_layernorm, self.k_layernorm), self.full_norm, self.tp)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q = Rotary.rotate(q, cos, sin, self.turn)
        k = Rotary.rotate(k, cos, sin, self.turn)
        if self.cp.size() > 1:
            k, v = GatherSequence.apply(k, self.cp), GatherSequence.apply(v, self.cp)
            q = self._swap_late_half(q)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        attended = self.causal(q, k, v) if pieces is None else self.varlen(q, k, v, pieces)
        out = attended.permute(2, 0, 1, 3)
        if self.cp.size() > 1:
            out = self._swap_late_half(out)
        return self.out(out.reshape(s, b, -1))[0]

    def _swap_late_half(self, x_SBHN: Tensor) -> Tensor:
        """Exchanges the later half of this rank's slice with the rank opposite (see query_pieces)."""
        early, late = x_SBHN.chunk(2)
        opposite = self.cp.size() - 1 - self.cp.rank()
        rows = [len(late) if rank == opposite else 0 for rank in range(self.cp.size())]
        return torch.cat([early, run_collective(late, async_all_to_all(rows, rows, self.cp))])


def _native_attention() -> CausalAttention:
    from ops.cpp.attention import causal_attention

    return causal_attention


def choose_attention(
    model: ModelConfig, groups: Groups, device: torch.device, dtype: torch.dtype, *, sequences: int
) -> tuple[CausalAttention, Choice]:
    """Ours in C++ on a CPU that it is made for, where it equals torch's here.

    Args:
        sequences: of a micro-batch.
    """
    part, name, why = "attention", "torch scaled_dot_product_attention", "picks the fastest kernel of the device itself"
    if not native.made_for(device, dtype) or native.slower_than_onednn():
        return torch_attention, Choice(part, name, why)
    key_heads = sequences * model.query_groups // groups.tp.size()
    if key_heads < torch.get_num_threads():  # a backward pass has a thread for each
        why = f"native would leave threads idle: {key_heads} key/value heads for {torch.get_num_threads()}"
        return torch_attention, Choice(part, name, why)

    def run(attend: CausalAttention) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v, above = (
            torch.randn(1, heads, 530, 40, generator=generator).to(device, dtype).requires_grad_()
            for heads in (2, 1, 1, 2)
        )
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), above.detach())]

    return select(part, [native.candidate(_native_attention)], (name, torch_attention), run, 1e-2)


def choose_varlen_attention(
    model: ModelConfig, groups: Groups, device: torch.device, dtype: torch.dtype
) -> tuple[VarlenAttention, Choice]:
    """For documents and context parallelism: torch's varlen kernels on a GPU in bf16, else the fused kernels joined by
    their log-sum-exps, where they equal attention under a mask."""
    heads = model.num_attention_heads // groups.tp.size()
    key_heads = model.query_groups // groups.tp.size()
    # Two sequences: documents that end within a piece, reach over both, and begin before the first query.
    rows = [[Segment(40, 30, 150), Segment(30, 150, 180)], [Segment(70, 0, 180)]]
    late = [[Segment(1, 170, 181), Segment(57, 181, 238)], [Segment(58, 100, 238)]]
    pieces = [Piece(slice(0, 70), rows), Piece(slice(70, 128), late)]

    def run(attend: VarlenAttention) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v, above = (
            torch.randn(2, h, tokens, model.head_width, generator=generator).to(device, dtype).requires_grad_()
            for h, tokens in ((heads, 128), (key_heads, 256), (key_heads, 256), (heads, 128))
        )
        out = attend(q, k, v, pieces)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), above.detach())]

    candidates = [Candidate("joined by log-sum-exp", lambda: joined_attention)]
    if device.type == "cuda" and dtype == torch.bfloat16:
        candidates.insert(0, Candidate("torch varlen", lambda: varlen_attention))
    reference = ("torch, under a mask", masked_attention)
    return select("attention", candidates, reference, run, 1e-5 if dtype == torch.float32 else 1e-2)


def _native_turn() -> Turn:
    from ops.cpp.attention import turn

    return turn


def choose_turn(device: torch.device, dtype: torch.dtype) -> tuple[Turn, Choice]:
    """Ours in C++ on a CPU that it is made for, where it equals torch's here."""

    def run(turn: Turn) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, angle = (torch.randn(5, 2, *shape, generator=generator) for shape in ((3, 44), (1, 22)))
        x, about = x.to(device, dtype), (angle.cos().to(device), angle.sin().to(device))
        return [turn(x, *about, torch.empty_like(x), back=back) for back in (False, True)]

    part, name = "positions", "torch, in blocks"
    if not native.made_for(device, dtype):
        return torch_turn, Choice(part, name, "rotary, in fp32")
    return select(part, [native.candidate(_native_turn)], (name, torch_turn), run, 1e-2)
