"""Stands for transformer_engine.pytorch.permutation.

Legend: T tokens, D hidden, K choices per token, R rows.
"""

import torch
from torch import Tensor


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """(rows [R, D] sorted by expert and then by token, the map for `moe_unpermute`). Of an index map [T, K] the row of
    choice k of token t is row_id_map[k * T + t], -1 for one that is past num_out_tokens; experts below 0 sort first."""
    assert map_type == "index" and routing_map.dtype == torch.int32 and inp.is_contiguous()
    tokens, top_k = routing_map.shape
    rows = num_out_tokens or tokens * top_k
    order = routing_map.flatten().sort(stable=True).indices[:rows]
    row_id_map = torch.full((top_k * tokens,), -1, dtype=torch.int32, device=inp.device)
    row_id_map[order % top_k * tokens + order // top_k] = torch.arange(rows, dtype=torch.int32, device=inp.device)
    return inp.index_select(0, order // top_k), row_id_map


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
) -> Tensor:
    """[T, D]: of every token the sum of its rows, times their probabilities [T, K]."""
    assert map_type == "index"
    top_k = 1 if merging_probs is None else merging_probs.shape[1]
    rows_TK = row_id_map.view(top_k, -1).t().long()
    padded_RD = torch.cat([inp, inp.new_zeros(1, inp.shape[1])])
    taken_TKD = padded_RD[rows_TK].float()
    return (taken_TKD if merging_probs is None else taken_TKD * merging_probs[..., None]).sum(1).to(inp.dtype)
