"""Attention against the float64 reference, which rotates by complex multiplication and attends head by head."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import DataConfig, ModelConfig
from models.attention import Attention
from models.init import initialise
from models.megatron_config import transformer_config
from models.rope import Rotary
from ops.attention_pieces import Piece, Segment, attention_pieces, piece_mask, query_pieces
from ops.varlen_attention import (
    VARLEN_ATTENTION,
    VarlenAttention,
    joined_attention,
    masked_attention,
    varlen_attention,
)
from parallel.process_groups import Runtime
from tests.moe import reference_attention
from tests.moe.helpers import CPU, assert_close, assert_gradients_close, in_float64, random, run_context, selected, tiny


def attention_of(model: ModelConfig, runtime: Runtime) -> Attention:
    config = transformer_config(model, runtime, torch.float32, deterministic=False)
    layer = Attention(model, config, runtime.groups).to(runtime.device)
    initialise(layer, seed=1)
    return layer


def attend(
    layer: Attention, x_SBD: Tensor, positions_BS: Tensor, document_mask: bool, theta: float, **limits: Any
) -> Tensor:
    device = layer.qkv.weight.device
    cos, sin = Rotary(layer.width, theta, 64).to(device)(positions_BS.t().to(device))
    return layer(x_SBD.to(device), cos, sin, attention_pieces(positions_BS, 0, 1, document_mask, **limits))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
"""Positions of two sequences of three and two documents."""


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 4},
        {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 6},
        {"num_attention_heads": 4, "num_query_groups": 1, "qk_norm": "head"},
        {"num_attention_heads": 4, "num_query_groups": 2, "qk_norm": "full"},
        {"num_attention_heads": 4, "num_query_groups": 2, "attention_bias": True, "clip_qkv": 1.5},
        {"num_attention_heads": 4, "num_query_groups": 2, "qk_norm": "head", "attention_bias": True, "clip_qkv": 0.9},
        {"num_attention_heads": 1, "head_dim": 2},
        {"num_attention_heads": 4, "num_query_groups": 2, "attention_output_gate": "head", "attention_bias": True},
        {"num_attention_heads": 4, "num_query_groups": 2, "attention_output_gate": "elementwise", "qk_norm": "head"},
        {"num_attention_heads": 2, "sliding_window": 3},
        {"num_attention_heads": 2, "attention_chunk_size": 3, "attention_output_bias": True},
        {"num_attention_heads": 4, "num_query_groups": 2, "attention_sinks": True, "sliding_window": 2},
        {"num_attention_heads": 4, "num_query_groups": 1, "attention_sinks": True},
    ],
    ids=str,
)
def test_equals_the_reference(sizes: dict[str, Any], document_mask: bool, runtime: Runtime) -> None:
    model = tiny(hidden_size=16, rope_theta=100.0, **sizes)
    layer = attention_of(model, runtime)
    for vector in (parameter for parameter in layer.parameters() if parameter.dim() == 1):
        vector.data.copy_(1 + 0.5 * random(*vector.shape))
    x_SBD = random(8, 2, 16, seed=4)
    x64_SBD, weights = x_SBD.double().requires_grad_(), in_float64(layer)
    sequences = [
        reference_attention.attention(x64_SBD[:, b], weights, model, PACKED[b].tolist(), document_mask)
        for b in range(2)
    ]
    wanted_SBD = torch.stack(sequences, dim=1)
    above_SBD = random(8, 2, 16, seed=9)
    (wanted_SBD * above_SBD).sum().backward()
    x_SBD.requires_grad_()
    limits = {"window": model.sliding_window, "chunk": model.attention_chunk_size, "sinks": model.attention_sinks}
    out_SBD = attend(layer, x_SBD, PACKED, document_mask, model.rope_theta, **limits)
    out_SBD.backward(above_SBD.to(out_SBD.device))
    assert_close(out_SBD, wanted_SBD)
    assert_close(x_SBD.grad, x64_SBD.grad)
    assert_gradients_close(layer, weights)


@pytest.mark.parametrize("limits", [{}, {"window": 2}, {"chunk": 3}], ids=str)
def test_document_mask_equals_each_document_alone(limits: dict[str, int], runtime: Runtime) -> None:
    model = tiny(hidden_size=16, num_attention_heads=4, num_query_groups=2)
    layer = attention_of(model, runtime)
    x_SBD = random(8, 2, 16)
    packed_SBD = attend(layer, x_SBD, PACKED, True, model.rope_theta, **limits)
    for b, lengths in enumerate(([4, 3, 1], [2, 6])):
        alone = [
            attend(layer, x_SD.unsqueeze(1), torch.arange(len(x_SD))[None], False, model.rope_theta, **limits)
            for x_SD in x_SBD[:, b].split(lengths)
        ]
        assert_close(packed_SBD[:, b : b + 1], torch.cat(alone).detach().cpu().double())


def masks_of(
    positions_BS: Tensor, rank: int = 0, ranks: int = 1, document_mask: bool = True, **limits: int
) -> list[Tensor]:
    pieces = attention_pieces(positions_BS, rank, ranks, document_mask, **limits)
    assert pieces is not None
    return [piece_mask(piece, torch.device("cpu")) for piece in pieces]


def test_mask_by_hand() -> None:
    """A row per query: itself and what came before it in its document."""
    positions_BS = torch.tensor([[0, 1, 0, 1]])
    [mask] = masks_of(positions_BS)
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert attention_pieces(positions_BS, 0, 1, document_mask=False) is None
    # A sequence may begin within a document.
    assert attention_pieces(torch.tensor([[7, 8, 0]]), 0, 1, document_mask=True) == [
        Piece(slice(0, 3), [[Segment(2, 0, 2), Segment(1, 2, 3)]])
    ]


def test_windows_and_chunks_by_hand() -> None:
    [window] = masks_of(torch.arange(4)[None], document_mask=False, window=2)
    assert window.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]]]
    [chunk] = masks_of(torch.arange(5)[None], document_mask=False, chunk=3)
    assert chunk.int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]]
    ]
    # Chunks are counted from the start of a document, of which this sequence may have only the end.
    [chunk] = masks_of(torch.tensor([[4, 5, 6, 0]]), chunk=3)
    assert chunk.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]
    # What the sequence is too short for needs no mask.
    assert attention_pieces(torch.arange(5)[None], 0, 1, False, window=5, chunk=5) is None
    assert attention_pieces(torch.arange(5)[None], 0, 1, False, sinks=True) is not None


def test_context_masks_by_hand() -> None:
    """Rank 0 of 2 attends from the first and the last quarter of the sequence; a letter per document: aaab bbbb."""
    assert [[*piece] for piece in query_pieces(8, 0, 2)] == [[0, 1], [6, 7]]
    assert [[*piece] for piece in query_pieces(8, 1, 2)] == [[4, 5], [2, 3]]
    masks = masks_of(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), 0, 2)
    assert [mask.int().tolist() for mask in masks] == [
        [[[[1, 0], [1, 1]]]],
        [[[[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]]]],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_context_ranks_share_queries_and_work_evenly(ranks: int) -> None:
    sequence = 6 * ranks
    work, positions = set(), []
    for rank in range(ranks):
        masks = masks_of(torch.arange(sequence)[None], rank, ranks, document_mask=False)
        work.add((sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)))
        positions += [position for piece in query_pieces(sequence, rank, ranks) for position in piece]
    assert sorted(positions) == [*range(sequence)]
    assert len(work) == 1  # computed and allowed pairs of query and key are as many on every rank
    # A little more than half of all pairs are computed, not all of them as under one mask for the whole sequence.
    assert work.pop()[0] * ranks == sequence**2 * (2 * ranks + 1) / (4 * ranks)


class VarlenOnCpu:
    """The kernels of torch.nn.attention.varlen by their definition, in place of torch.ops.aten: the last query of a
    segment sees its last key, and window_size_left keys before its own (-1: all)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.aten, name)

    @staticmethod
    def segments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, before: int):
        """(queries, keys, q, k and v of each head, scores, which are -inf where a key is not seen)."""
        assert q.dim() == k.dim() == 3 and cu_q.dtype == torch.int32
        assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
        for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            assert q1 - q0 <= max_q and k1 - k0 <= max_k
            queries, keys = slice(q0, q1), slice(k0, k1)
            each = [t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k[keys], v[keys])]
            own = int(k1 - k0) - int(q1 - q0)
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(own)
            mask = mask if before < 0 else mask.triu(own - before)
            scores = q[queries].transpose(0, 1) @ each[0].transpose(1, 2) / q.shape[-1] ** 0.5
            yield queries, keys, q[queries].transpose(0, 1), *each, scores.masked_fill(~mask, -torch.inf)

    @classmethod
    def forward(cls, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = [], []
        for _, _, _, _, v, scores in cls.segments(*arguments):
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
            lse.append(scores.logsumexp(-1))
        return torch.cat(out), torch.cat(lse, 1)

    @classmethod
    def _flash_attention_forward(cls, *arguments: Any, window_size_left: int, window_size_right: int) -> Any:
        assert arguments[7:] == (0.0, window_size_left < 0, False) and window_size_right == 0
        return cls.forward(*arguments[:7], window_size_left)

    @classmethod
    def _flash_attention_backward(cls, grad: Tensor, *arguments: Any, window_size_left: int, window_size_right: int):
        q, k, v, out, lse, *packing, dropout, causal, _, _ = arguments
        assert (dropout, causal, window_size_right) == (0.0, window_size_left < 0, 0) and grad.is_contiguous()
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for queries, keys, q_HSN, k_HKN, v_HKN, scores in cls.segments(q, k, v, *packing, window_size_left):
            grad_HSN, share = grad[queries].transpose(0, 1), (scores - lse[:, queries, None]).exp()
            inner = (grad[queries] * out[queries]).sum(-1).t()[..., None]
            dscores = share * (grad_HSN @ v_HKN.transpose(1, 2) - inner) / q.shape[-1] ** 0.5
            dq[queries] = (dscores @ k_HKN).transpose(0, 1)
            for d, each in ((dk, dscores.transpose(1, 2) @ q_HSN), (dv, share.transpose(1, 2) @ grad_HSN)):
                d[keys] = each.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
        return dq, dk, dv


@pytest.mark.parametrize("attend", [joined_attention, varlen_attention])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    "limits",
    [{}, {"window": 1}, {"window": 7}, {"window": 20}, {"chunk": 5}, {"window": 11, "sinks": True}, {"sinks": True}],
    ids=str,
)
def test_without_a_mask_equals_the_masked_reference(
    attend: VarlenAttention,
    rank: int,
    ranks: int,
    document_mask: bool,
    groups: int,
    limits: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ops.varlen_attention._varlen", lambda: lambda *arguments: VarlenOnCpu.forward(*arguments)[0])
    if attend is varlen_attention:
        monkeypatch.setattr("ops.varlen_attention.aten", VarlenOnCpu())
    positions_BS = torch.cat([torch.arange(n) for n in (5, 1, 17, 13, 23, 1, 6, 6)] * 2).view(2, 72).roll(3, 1)
    pieces = attention_pieces(positions_BS, rank, ranks, document_mask, **limits)
    if pieces is None:
        pieces = [Piece(slice(0, 72), [[Segment(72, 0, 72)]])]
    queries = 72 // ranks
    q, above = (random(2, 4, queries, 8, seed=seed).double() for seed in (1, 2))
    k, v = (random(2, groups, 72, 8, seed=seed).double() for seed in (3, 4))
    sinks = [random(4, seed=5).double()] if "sinks" in limits else []
    leaves = [t.requires_grad_() for t in (q, k, v, *sinks)]
    wanted = masked_attention(*leaves[:3], pieces, *leaves[3:])
    got = attend(*leaves[:3], pieces, *leaves[3:])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, leaves, above), torch.autograd.grad(wanted, leaves, above), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_differs_from_the_reference_is_left_out(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(hidden_size=16, num_attention_heads=4, num_query_groups=2)
    context = run_context(model, runtime, device=CPU, data=DataConfig(document_mask=True))
    attend, row = selected(VARLEN_ATTENTION, context)
    assert attend is joined_attention and row.name == "joined by log-sum-exp"

    def all_keys(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], sinks: None) -> Tensor:
        """Forgets where documents begin."""
        whole = [Piece(p.queries, [[s._replace(first_key=0) for s in row] for row in p.rows]) for p in pieces]
        return joined_attention(q, k, v, whole)

    monkeypatch.setattr("ops.varlen_attention.joined_attention", all_keys)
    attend, row = selected(VARLEN_ATTENTION, context)
    assert attend is masked_attention and "differs from torch's by" in row.why and row.refused


@pytest.mark.parametrize(
    ("ranks", "document_mask", "limits"),
    [
        (1, True, {}),
        (4, False, {}),
        (4, True, {}),
        (1, False, {"window": 64}),
        (4, False, {"window": 64}),
        (1, False, {"chunk": 64}),
    ],
)
def test_memory_grows_with_the_tokens(ranks: int, document_mask: bool, limits: dict[str, int]) -> None:
    """Largest tensor, and all that is kept for the backward pass, in values per token; a mask is 64 times as much."""

    def sizes(sequence: int) -> tuple[float, float]:
        documents = torch.arange(sequence) % 64
        pieces = attention_pieces(documents[None], ranks - 1, ranks, document_mask, **limits)
        q = random(1, 2, sequence // ranks, 8).requires_grad_()
        k, v = (random(1, 1, sequence, 8).requires_grad_() for _ in range(2))
        kept: list[int] = []
        with (
            Largest() as seen,
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
        ):
            joined_attention(q, k, v, pieces).sum().backward()
        return seen.values / sequence, sum(kept) / sequence

    assert sizes(4096) == sizes(512) != (0, 0)


class Largest(TorchDispatchMode):
    """The largest result of an operation."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
        self.values = max([self.values, *(t.numel() for t in tensors)])
        return result


def test_scores_depend_on_the_distance_alone() -> None:
    """What rotary positions are for: query and key moved together give the same product."""
    rotary = Rotary(8, 100.0, 64)

    def score(query_position: int, key_position: int) -> float:
        query, key = (
            Rotary.rotate(random(1, 1, 1, 8, seed=seed), *rotary(torch.tensor([[position]])))
            for seed, position in ((1, query_position), (2, key_position))
        )
        return (query * key).sum().item()

    assert score(40, 37) == pytest.approx(score(3, 0), rel=1e-5)
    assert score(40, 36) != pytest.approx(score(3, 0), rel=1e-2)
