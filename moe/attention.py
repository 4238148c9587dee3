"""Causal grouped-query attention with rotary positions.

Legend: S sequence (this rank's slice), B batch, D hidden, H heads of this rank, G key/value groups of this rank, N
width of a head.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from moe.kernels.native import library as native
from parallel.blocks import rows_at_once
from parallel.collectives import GatherSequence
from parallel.flight import exchanging, fly
from parallel.placement import place
from parallel.runtime import Groups
from parallel.selection import Choice, select

Masks = list[Tensor | None]
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


def torch_attention(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, mask: Tensor | None = None) -> Tensor:
    gqa = q_BHSN.shape[1] != k_BGSN.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSN, k_BGSN, v_BGSN, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
    )


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), halves instead of interleaved pairs."""

    def __init__(self, width: int, theta: float, max_positions: int):
        super().__init__()
        angle = torch.outer(torch.arange(max_positions).float(), theta ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def angles(self, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
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
    ):
        """causal, turn: what attends where there is no mask, and what rotates (choose_attention, choose_turn)."""
        super().__init__()
        self.cp, self.causal, self.turn = groups.cp, causal, turn
        ranks = groups.tp.size()
        query_groups = model.num_query_groups or model.num_attention_heads
        self.width = model.hidden_size // model.num_attention_heads
        self.heads, self.groups = model.num_attention_heads // ranks, query_groups // ranks
        linear = {"config": config, "bias": False, "init_method": None, "tp_group": groups.tp}
        # Rows per key/value group: its queries, its key, its value. So a tensor-parallel slice is whole groups.
        self.qkv = tp.ColumnParallelLinear(
            model.hidden_size,
            self.width * (model.num_attention_heads + 2 * query_groups),
            gather_output=False,
            **linear,
        )
        self.out = tp.RowParallelLinear(
            self.width * model.num_attention_heads,
            model.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        std = (model.init_scale / model.hidden_size) ** 0.5
        place(self.qkv.weight, (0, groups.tp), std=std)
        place(self.out.weight, (1, groups.tp), std=std)

    def forward(self, x_SBD: Tensor, cos: Tensor, sin: Tensor, masks: Masks) -> Tensor:
        """masks: from attention_masks, one for each piece of the queries."""
        qkv = self.qkv(x_SBD)[0]
        s, b, _ = qkv.shape
        queries = self.heads // self.groups
        q, k, v = qkv.view(s, b, self.groups, -1).split([queries * self.width, self.width, self.width], -1)
        q = Rotary.rotate(q.reshape(s, b, self.heads, self.width), cos, sin, self.turn)
        k = Rotary.rotate(k, cos, sin, self.turn)
        if self.cp.size() > 1:
            k, v = GatherSequence.apply(k, self.cp), GatherSequence.apply(v, self.cp)
            q = self._swap_late_half(q)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        attended = [self._attend(piece, k, v, mask) for piece, mask in zip(q.chunk(len(masks), 2), masks, strict=True)]
        # A cat of one tensor would copy it.
        out = (attended[0] if len(attended) == 1 else torch.cat(attended, 2)).permute(2, 0, 1, 3)
        if self.cp.size() > 1:
            out = self._swap_late_half(out)
        return self.out(out.reshape(s, b, -1))[0]

    def _attend(self, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, mask: Tensor | None) -> Tensor:
        """A mask says by its width how many keys these queries see the last of."""
        if mask is None:
            return self.causal(q_BHSN, k_BGSN, v_BGSN)
        seen = mask.shape[-1]
        return torch_attention(q_BHSN, k_BGSN[:, :, :seen], v_BGSN[:, :, :seen], mask)

    def _swap_late_half(self, x_SBHN: Tensor) -> Tensor:
        """Exchanges the later half of this rank's slice with the rank opposite (see query_pieces)."""
        early, late = x_SBHN.chunk(2)
        opposite = self.cp.size() - 1 - self.cp.rank()
        rows = [len(late) if rank == opposite else 0 for rank in range(self.cp.size())]
        return torch.cat([early, fly(late, exchanging(rows, rows, self.cp))])


def query_pieces(sequence: int, rank: int, ranks: int) -> list[range]:
    """The positions whose queries a context-parallel rank attends with.

    Each rank holds a slice of the sequence, but the later a token the more it looks back on: attending with its own
    queries, the last rank would have nearly all the work. So rank i keeps the earlier half of its slice and exchanges
    the later one with rank n - 1 - i. With the sequence in 2 n parts, i then has parts 2 i and 2 (n - 1 - i) + 1,
    which look back on 2 i + 1 and 2 (n - 1 - i) + 2 parts: together 2 n + 1, whatever i.
    """
    if ranks == 1:
        return [range(sequence)]
    size = sequence // (2 * ranks)
    return [range(part * size, (part + 1) * size) for part in (2 * rank, 2 * (ranks - 1 - rank) + 1)]


def attention_masks(positions_BS: Tensor, cp: dist.ProcessGroup, document_mask: bool) -> Masks:
    """Who may attend to whom, for each piece of this rank's queries: bool [B or 1, 1, queries, keys up to the last
    that one of them may see]; None where plain causal attention says it.

    Args:
        positions_BS: positions of the whole sequence; a 0 starts a document.
    """
    if cp.size() == 1 and not document_mask:
        return [None]
    document_BS = (positions_BS == 0).cumsum(1)
    masks: Masks = []
    for piece in query_pieces(positions_BS.shape[1], cp.rank(), cp.size()):
        token = torch.arange(piece.stop, device=positions_BS.device)
        query = token[piece.start :]
        mask = (query[:, None] >= token).expand(1, -1, -1)
        if document_mask:
            mask = mask & (document_BS[:, query, None] == document_BS[:, None, token])
        masks.append(mask.unsqueeze(1))
    return masks


def _native_attention() -> CausalAttention:
    from moe.kernels.native.attention import causal_attention

    return causal_attention


def choose_attention(
    model: ModelConfig, groups: Groups, device: torch.device, dtype: torch.dtype, *, sequences: int, document_mask: bool
) -> tuple[CausalAttention, Choice]:
    """Ours in C++ on a CPU that it is made for, where it equals torch's here.

    Args:
        sequences: of a micro-batch.
    """
    part, name, why = "attention", "torch scaled_dot_product_attention", "picks the fastest kernel of the device itself"
    if not native.made_for(device, dtype) or native.slower_than_onednn():
        return torch_attention, Choice(part, name, why)
    if document_mask or groups.cp.size() > 1:
        return torch_attention, Choice(part, name, "native knows no mask: of documents, or of cp > 1")
    key_heads = sequences * (model.num_query_groups or model.num_attention_heads) // groups.tp.size()
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


def _native_turn() -> Turn:
    from moe.kernels.native.attention import turn

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
