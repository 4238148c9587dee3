"""Stands for transformer_engine.pytorch.attention.

Legend: T tokens of all sequences, S of one, B batch, H heads, G key/value groups, N width of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import GatherSequence


class DotProductAttention(nn.Module):
    """softmax(q @ k.T * scale) @ v; the result has the heads' widths joined."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        tp_size: int = 1,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
    ):
        super().__init__()
        assert attention_type in ("self", "cross") and not attention_dropout and tp_size == 1
        assert softmax_type in ("vanilla", "learnable") and isinstance(kv_channels, int)
        self.heads, self.groups, self.width = num_attention_heads, num_gqa_groups or num_attention_heads, kv_channels
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, attn_mask_type, window_size
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.softmax_offset = nn.Parameter(torch.zeros(num_attention_heads)) if softmax_type == "learnable" else None

        self.cp_group: Any = None
        self.cp_comm_type = ""

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: list[int], cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        assert cp_global_ranks == dist.get_process_group_ranks(cp_group) and cp_comm_type in ("p2p", "a2a")
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        assert attention_mask is None
        kind, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        window = window_size or self.window_size or (-1, 0)
        assert query_layer.shape[-2:] == (self.heads, self.width) and key_layer.shape[-2] == self.groups
        if self.cp_group is not None and self.cp_group.size() > 1:
            assert (kind, mask) in (("thd", "padding_causal"), ("bshd", "causal"), ("sbhd", "causal"))
            qkv = query_layer, key_layer, value_layer
            if kind != "thd":
                return self._between_ranks(*qkv, window[0], batch=1 if kind == "sbhd" else 0)
            assert cu_seqlens_q is cu_seqlens_kv is cu_seqlens_q_padded is cu_seqlens_kv_padded is not None
            assert pad_between_seqs is False and cu_seqlens_q is not None and max_seqlen_q == max_seqlen_kv
            lengths = cu_seqlens_q.diff()
            assert lengths.max() == max_seqlen_q and not (lengths % (2 * self.cp_group.size())).any()
            documents = zip(*(t.split((lengths // self.cp_group.size()).tolist()) for t in qkv), strict=True)
            return torch.cat([self._between_ranks(*(t[None] for t in of), window[0])[0] for of in documents])
        assert cu_seqlens_q_padded is cu_seqlens_kv_padded is None
        if kind == "thd":
            assert mask in ("padding_causal", "padding_causal_bottom_right")
            assert cu_seqlens_q is not None and cu_seqlens_kv is not None
            assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
            lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_kv)]
            assert [max(n) for n in lengths] == [max_seqlen_q, max_seqlen_kv]
            parts = zip(
                query_layer.split(lengths[0]), *(t.split(lengths[1]) for t in (key_layer, value_layer)), strict=True
            )
            return torch.cat([self._attend(q, k, v, mask, window[0]) for q, k, v in parts]).flatten(-2)
        assert kind in ("sbhd", "bshd") and mask in ("causal", "causal_bottom_right")
        batch = 1 if kind == "sbhd" else 0
        parts = zip(*(t.unbind(batch) for t in (query_layer, key_layer, value_layer)), strict=True)
        return torch.stack([self._attend(q, k, v, mask, window[0]) for q, k, v in parts], batch).flatten(-2)

    def _between_ranks(self, *qkv: Any, batch: int = 0) -> Tensor:
        """Of queries, keys, values and how many keys are seen before. Rank i of n has the parts i and 2 n - 1 - i of
        the 2 n of every sequence. batch: its dimension."""
        *tensors, before = qkv
        q_SBHN, k_SBGN, v_SBGN = (t.transpose(0, 1 - batch) for t in tensors)
        rank, ranks = self.cp_group.rank(), self.cp_group.size()
        assert len(q_SBHN) % 2 == 0, "not divisible by 2"
        if self.cp_comm_type == "p2p":
            assert before == -1 and self.softmax_offset is None, "neither windows nor sinks"
        else:
            assert self.heads % ranks == 0 == self.groups % ranks, "heads are not divisible"
        order = [part for r in range(ranks) for part in (r, 2 * ranks - 1 - r)]
        whole = []
        for t in (k_SBGN, v_SBGN):
            parts = GatherSequence.apply(t, self.cp_group).chunk(2 * ranks)
            whole.append(torch.cat([parts[order.index(part)] for part in range(2 * ranks)]))
        out = []
        for part, q in zip((rank, 2 * ranks - 1 - rank), q_SBHN.chunk(2), strict=True):
            seen = (part + 1) * len(q)
            rows = zip(q.unbind(1), *(t[:seen].unbind(1) for t in whole), strict=True)
            out.append(torch.stack([self._attend(*row, "causal_bottom_right", before) for row in rows], 1))
        return torch.cat(out).transpose(0, 1 - batch).flatten(-2)

    def _attend(self, q_SHN: Tensor, k_SGN: Tensor, v_SGN: Tensor, mask: str, before: int) -> Tensor:
        """[S, H, N], of one sequence. A mask is aligned to the first key, or to the last if its name says so."""
        queries, keys, repeats = len(q_SHN), len(k_SGN), self.heads // self.groups
        k, v = (t.repeat_interleave(repeats, 1).float() for t in (k_SGN, v_SGN))
        scores_HST = torch.einsum("shn,thn->hst", q_SHN.float(), k) * self.scale
        place_S1 = torch.arange(queries)[:, None] + (keys - queries if mask.endswith("bottom_right") else 0)
        hidden_ST = torch.arange(keys) > place_S1
        if before >= 0:
            hidden_ST |= torch.arange(keys) < place_S1 - before
        scores_HST = scores_HST.masked_fill(hidden_ST, -torch.inf)
        if self.softmax_offset is not None:
            offset_HS1 = self.softmax_offset.float()[:, None, None].expand(-1, queries, 1)
            scores_HST = torch.cat([scores_HST, offset_HS1], -1)
        probs_HST = scores_HST.softmax(-1)[..., :keys]
        return torch.einsum("hst,thn->shn", probs_HST, v).to(q_SHN.dtype)
