"""TransformerEngine's fused attention: of whole sequences, and of documents packed one after the other, with windows
and, where the version has them, sinks. Under context parallelism keys have been gathered and queries exchanged before
(models.attention.CoreAttention), so that each rank attends with documents of its own; or TransformerEngine exchanges
(TeCpAttention).

Legend: S sequence, B batch, T packed tokens, H heads of this rank, G key/value groups of this rank, N width of a head.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.attention_pieces import Piece
from ops.cp_exchange import documents_of, exchange
from ops.varlen_attention import Packing, VarlenAttention, packed_attention, run_offsets


class TeAttention:
    """Its modules, one for each kind of heads."""

    def __init__(self) -> None:
        from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

        self._module, self._made = DotProductAttention, dict[tuple[Any, ...], Any]()
        self.varlen: VarlenAttention = partial(packed_attention, self._packed)

    def _of(self, q: Tensor, k: Tensor, **kind: Any) -> Any:
        """The module of such queries and keys [..., heads, N]."""
        heads, width, groups = q.shape[-2], q.shape[-1], k.shape[-2]
        key = (heads, width, groups, *sorted(kind.items()))
        if key not in self._made:
            self._made[key] = self._module(heads, width, num_gqa_groups=groups, attention_dropout=0.0, **kind)
        return self._made[key]

    def causal(self, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor) -> Tensor:
        """ops.attention.CausalAttention."""
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q_BHSN, k_BGSN, v_BGSN))
        out = self._of(q, k, qkv_format="sbhd", attn_mask_type="causal")(q, k, v)
        return out.unflatten(-1, q.shape[-2:]).permute(1, 2, 0, 3)

    def _packed(self, q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor, packing: Packing, sinks_H: Tensor | None) -> Tensor:
        """ops.varlen_attention.PackedAttention. Runs of as many keys as queries are sequences of their own; other masks
        are aligned to the last key, which fewer kernels know."""
        alike = packing.queries == packing.keys
        sinks = {} if sinks_H is None else {"softmax_type": "learnable"}
        kind = {"qkv_format": "thd", "attention_type": "self" if alike else "cross", **sinks}
        module = self._of(q_THN, k_TGN, attn_mask_type="padding_causal", **kind)
        offsets_q = run_offsets(packing.queries, q_THN.device)
        offsets_k = offsets_q if alike else run_offsets(packing.keys, q_THN.device)
        how = {
            "cu_seqlens_q": offsets_q,
            "cu_seqlens_kv": offsets_k,
            "max_seqlen_q": max(packing.queries),
            "max_seqlen_kv": max(packing.keys),
            "attn_mask_type": "padding_causal" if alike else "padding_causal_bottom_right",
            "window_size": (packing.before, 0),
        }
        return _with_sinks(module, sinks_H, (q_THN, k_TGN, v_TGN), how).unflatten(-1, q_THN.shape[-2:])


class TeCpAttention(TeAttention):
    """ops.cp_attention.CpAttention. It wants the tokens of a document in an order of its own: they are exchanged before
    and after it. Documents that are padded for it are longer ones to it: what is said to be padding, fewer of its
    kernels take."""

    def __init__(self, group: dist.ProcessGroup, comm_type: str):
        """comm_type: p2p: keys and values travel from rank to rank; a2a: a rank gets some heads of all tokens."""
        super().__init__()
        self.group, self.comm_type = group, comm_type
        self.ranks = dist.get_process_group_ranks(group)
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(
        self, q_SBHN: Tensor, k_SBGN: Tensor, v_SBGN: Tensor, pieces: list[Piece] | None, sinks_H: Tensor | None
    ) -> Tensor:
        (size, batch), ranks, window = q_SBHN.shape[:2], self.group.size(), pieces[0].window if pieces else None
        documents = documents_of(pieces, size * ranks, batch)
        plan = exchange(documents, self.group.rank(), ranks, q_SBHN.device)
        q, k, v = (plan.there(t, self.group) for t in (q_SBHN, k_SBGN, v_SBGN))
        how: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
        packed = len(plan.padded) > batch
        if packed:
            offsets, longest = run_offsets(plan.padded, q.device), max(plan.padded)
            how |= {f"cu_seqlens_{of}": offsets for of in ("q", "kv", "q_padded", "kv_padded")}
            how |= {"max_seqlen_q": longest, "max_seqlen_kv": longest, "pad_between_seqs": False}
        else:
            q, k, v = (t.unflatten(0, (batch, -1)) for t in (q, k, v))
        kind = {"qkv_format": "thd", "attn_mask_type": "padding_causal"} if packed else {"qkv_format": "bshd"}
        sinks = {} if sinks_H is None else {"softmax_type": "learnable"}
        module = self._of(q, k, **{"attn_mask_type": "causal", **kind, **sinks})
        module.set_context_parallel_group(self.group, self.ranks, self.stream, self.comm_type)
        out = _with_sinks(module, sinks_H, (q, k, v), how).unflatten(-1, q.shape[-2:])
        return plan.back(out.flatten(0, -3), q_SBHN, self.group)


def _with_sinks(module: Any, sinks_H: Tensor | None, qkv: tuple[Tensor, ...], how: dict[str, Any]) -> Tensor:
    if sinks_H is None:
        return module(*qkv, **how)
    # Its parameter, in fp32.
    return torch.func.functional_call(module, {"softmax_offset": sinks_H.float()}, qkv, how)
