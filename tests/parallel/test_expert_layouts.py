"""Biases, shared experts, dropout, padding to capacity, and each way to the experts: the same under every layout."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.parity import Outcome, measure
from benchmarks.tiny import Variant
from conf.schema import ParallelConfig
from tests.parallel.test_parity import relative

GATHER, PAD = {"dispatcher": "all_gather"}, {"pad_to_capacity": True}
SHARED = {"num_shared_experts": 2, "shared_expert_gate": True}
VARIANTS = {
    "plain": Variant(),
    "peers": Variant(moe=SHARED | {"expert_bias": True}),
    "dropout": Variant(moe={"expert_dropout": 0.4}),
    "experts choose": Variant(
        moe={"load_balancing": "expert_choice", "capacity_factor": 0.75, "expert_dropout": 0.4, "num_shared_experts": 1}
    ),
    "dropless": Variant(moe=SHARED | {"capacity_factor": None, "top_k": 3}),
}
CELLS = [
    # ranks, layout, variant, what is set and must change nothing
    (1, {}, "plain", PAD),
    (2, {"ep": 2}, "plain", GATHER | PAD),
    (2, {"ep": 2}, "peers", {"dispatcher": "all_to_all"}),
    (2, {"ep": 2}, "dropless", {}),  # auto: all-gather, as a token visits more experts than there are ranks
    (2, {"tp": 2, "sequence_parallel": True}, "peers", PAD),
    (2, {"tp": 2, "etp": 2}, "peers", {}),
    (4, {"tp": 2, "ep": 2, "etp": 2}, "peers", PAD | {"dispatcher": "all_to_all"}),
    (4, {"cp": 2, "ep": 2, "etp": 2}, "peers", GATHER),
    (4, {"tp": 2, "ep": 2, "etp": 2}, "dropless", GATHER),
    (4, {"tp": 2, "ep": 4}, "plain", GATHER | PAD),
    (4, {"tp": 2, "ep": 4, "sequence_parallel": True}, "experts choose", PAD),
    (2, {"pp": 2}, "dropout", {"expert_chunk_rows": 7}),
    (2, {"ep": 2}, "dropout", PAD | {"dispatcher": "all_to_all"}),
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, "dropout", {"dispatcher": "all_to_all"}),
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2, "sequence_parallel": True}, "dropout", GATHER),
]


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return ranks.run(1, measure, ParallelConfig(), VARIANTS, timeout=120)[0]


@pytest.mark.parametrize("size, degrees, name, settings", CELLS, ids=lambda p: str(p).replace("'", ""))
def test_a_layout_is_the_same_model(ranks, one_rank, size, degrees, name, settings):
    variant = replace(VARIANTS[name], moe=VARIANTS[name].moe | settings)
    got = ranks.run(size, measure, ParallelConfig(**degrees), {name: variant}, timeout=120)[0][name]
    wanted = one_rank[name]
    assert relative(got.losses, wanted.losses) < 1e-5
    assert relative(got.norms, wanted.norms) < 1e-5
    assert np.array_equal(got.load_SLE, wanted.load_SLE) and np.array_equal(got.dropped_SL, wanted.dropped_SL)
    assert relative(got.evaluation[0], wanted.evaluation[0]) < 1e-5 and got.evaluation[1] == wanted.evaluation[1]
    assert relative(got.logits_V, wanted.logits_V) < 1e-5
    assert got.gradients.keys() == wanted.gradients.keys()
    differences = {key: relative(got.gradients[key], whole) for key, whole in wanted.gradients.items()}
    assert max(differences.values()) <= 1e-5, differences


def test_every_part_is_trained(one_rank):
    parts = ("experts.b_in", "experts.b_out", "shared.gate", "shared.ffn.up.weight")
    for part in parts:
        gradients = [g for name, g in one_rank["peers"].gradients.items() if name.endswith(part)]
        assert len(gradients) == 4 and all(np.abs(g).max() > 0 for g in gradients), part
    squares = sum(np.square(g.astype(np.float64)).sum() for g in one_rank["peers"].gradients.values())
    assert relative(one_rank["peers"].norms[0], np.sqrt(squares)) < 1e-6
    assert (one_rank["peers"].dropped_SL > 0).all() and (one_rank["dropless"].dropped_SL == 0).all()
