"""Attention against the float64 reference, which rotates by complex multiplication and attends head by head."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from moe.attention import Attention, Rotary, attention_masks, query_pieces
from moe.init import initialise
from parallel.engine import core_config
from parallel.runtime import Runtime
from tests.moe import reference
from tests.moe.helpers import assert_close, assert_gradients_close, in_float64, random, tiny


def attention_of(model: ModelConfig, runtime: Runtime) -> Attention:
    config = core_config(model, runtime, torch.float32, deterministic=False)
    layer = Attention(model, config, runtime.groups).to(runtime.device)
    initialise(layer, seed=1)
    return layer


def attend(layer: Attention, x_SBD: Tensor, positions_BS: Tensor, document_mask: bool, theta: float) -> Tensor:
    device = layer.qkv.weight.device
    positions_BS = positions_BS.to(device)
    cos, sin = Rotary(layer.width, theta, 64).to(device).angles(positions_BS.t())
    return layer(x_SBD.to(device), cos, sin, attention_masks(positions_BS, layer.cp, document_mask))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
"""Positions of two sequences of three and two documents."""


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, None), (4, 2), (4, 1), (1, None)])
def test_equals_the_reference(heads: int, groups: int | None, document_mask: bool, runtime: Runtime) -> None:
    model = tiny(hidden_size=16, num_attention_heads=heads, num_query_groups=groups, rope_theta=100.0)
    layer = attention_of(model, runtime)
    x_SBD = random(8, 2, 16, seed=heads)
    x64_SBD, weights = x_SBD.double().requires_grad_(), in_float64(layer)
    sequences = [
        reference.attention(x64_SBD[:, b], weights, model, PACKED[b].tolist(), document_mask) for b in range(2)
    ]
    wanted_SBD = torch.stack(sequences, dim=1)
    above_SBD = random(8, 2, 16, seed=9)
    (wanted_SBD * above_SBD).sum().backward()
    x_SBD.requires_grad_()
    out_SBD = attend(layer, x_SBD, PACKED, document_mask, model.rope_theta)
    out_SBD.backward(above_SBD.to(out_SBD.device))
    assert_close(out_SBD, wanted_SBD)
    assert_close(x_SBD.grad, x64_SBD.grad)
    assert_gradients_close(layer, weights)


def test_document_mask_equals_each_document_alone(runtime: Runtime) -> None:
    model = tiny(hidden_size=16, num_attention_heads=4, num_query_groups=2)
    layer = attention_of(model, runtime)
    x_SBD = random(8, 2, 16)
    packed_SBD = attend(layer, x_SBD, PACKED, True, model.rope_theta)
    for b, lengths in enumerate(([4, 3, 1], [2, 6])):
        alone = [
            attend(layer, x_SD.unsqueeze(1), torch.arange(len(x_SD))[None], False, model.rope_theta)
            for x_SD in x_SBD[:, b].split(lengths)
        ]
        assert_close(packed_SBD[:, b : b + 1], torch.cat(alone).detach().cpu().double())


def test_mask_by_hand(runtime: Runtime) -> None:
    """A row per query: itself and what came before it in its document."""
    positions_BS = torch.tensor([[0, 1, 0, 1]])
    [mask] = attention_masks(positions_BS, runtime.groups.cp, document_mask=True)
    assert mask is not None
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert attention_masks(positions_BS, runtime.groups.cp, document_mask=False) == [None]


@dataclass(frozen=True)
class Rank:
    """As much of a process group as masks ask for."""

    index: int
    ranks: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.ranks


def test_context_masks_by_hand() -> None:
    """Rank 0 of 2 attends from the first and the last quarter of the sequence; a letter per document: aaab bbbb."""
    assert [[*piece] for piece in query_pieces(8, 0, 2)] == [[0, 1], [6, 7]]
    assert [[*piece] for piece in query_pieces(8, 1, 2)] == [[4, 5], [2, 3]]
    positions_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    masks = attention_masks(positions_BS, Rank(0, 2), document_mask=True)
    assert [mask.int().tolist() for mask in masks] == [
        [[[[1, 0], [1, 1]]]],
        [[[[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]]]],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_context_ranks_share_queries_and_work_evenly(ranks: int) -> None:
    sequence = 6 * ranks
    work, positions = set(), []
    for rank in range(ranks):
        masks = attention_masks(torch.arange(sequence)[None], Rank(rank, ranks), document_mask=False)
        work.add((sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)))
        positions += [position for piece in query_pieces(sequence, rank, ranks) for position in piece]
    assert sorted(positions) == [*range(sequence)]
    assert len(work) == 1  # computed and allowed pairs of query and key are as many on every rank
    # A little more than half of all pairs are computed, not all of them as under one mask for the whole sequence.
    assert work.pop()[0] * ranks == sequence**2 * (2 * ranks + 1) / (4 * ranks)


def test_scores_depend_on_the_distance_alone() -> None:
    """What rotary positions are for: query and key moved together give the same product."""
    rotary = Rotary(8, 100.0, 64)

    def score(query_position: int, key_position: int) -> float:
        query, key = (
            Rotary.rotate(random(1, 1, 1, 8, seed=seed), *rotary.angles(torch.tensor([[position]])))
            for seed, position in ((1, query_position), (2, key_position))
        )
        return (query * key).sum().item()

    assert score(40, 37) == pytest.approx(score(3, 0), rel=1e-5)
    assert score(40, 36) != pytest.approx(score(3, 0), rel=1e-2)
