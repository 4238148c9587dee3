"""Every layout is the same model: losses, gradients, routing decisions and drops equal those of one rank."""

import dataclasses

import numpy as np
import pytest

from conf.schema import ParallelConfig
from tests.parallel.helpers import Outcome, Variant, measure

# What is decided over the whole micro-batch, or could depend on the order of its tokens, other than in Switch.
DEEPSEEK = {"score_function": "sigmoid", "num_experts": 8, "num_expert_groups": 4, "top_k_groups": 2}
DEEPSEEK |= {"load_balancing": "seq_aux_loss", "drop_policy": "probability", "bias_update_rate": 0.01}

VARIANTS = {
    "drops": Variant(),
    "dropless": Variant({"tie_embeddings": True}, {"capacity_factor": None, "every": 2}, document_mask=True),
    "switch": Variant({"tie_embeddings": True}, {"top_k": 1}),
    "switch_documents": Variant(moe={"top_k": 1, "every": 2}, document_mask=True),
    "deepseek": Variant(moe=DEEPSEEK),
    "expert_choice": Variant(moe={"load_balancing": "expert_choice", "capacity_factor": 0.75}),
    "sinkhorn": Variant(moe={"load_balancing": "sinkhorn", "jitter": 0.1, "drop_policy": "random"}),
    "global": Variant(moe={"load_balancing": "global_aux_loss", "jitter": 0.1, "drop_policy": "random", "every": 2}),
    "dense": Variant({"tie_embeddings": True}, {"num_experts": 0}),
}

CELLS = [
    (2, {}, ["switch", "global"]),
    (2, {"tp": 2}, ["drops", "dense", "global"]),
    (
        2,
        {"tp": 2, "sequence_parallel": True},
        ["switch", "dropless", "deepseek", "expert_choice", "sinkhorn", "global"],
    ),
    (2, {"pp": 2}, ["dropless", "dense"]),
    (2, {"pp": 2, "vpp": 2}, ["switch_documents", "switch"]),
    (2, {"cp": 2}, ["switch_documents", "drops", "sinkhorn"]),
    (2, {"ep": 2}, ["switch", "dropless"]),
    (4, {"ep": 4}, ["drops"]),
    (2, {"tp": 2, "etp": 2}, ["drops", "switch_documents"]),
    (4, {"tp": 2, "pp": 2, "ep": 2}, ["dropless"]),
    (8, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "sequence_parallel": True}, ["switch"]),
    (8, {"cp": 2, "tp": 2, "ep": 4}, ["drops", "expert_choice"]),
    (8, {"cp": 2, "tp": 2, "pp": 2, "sequence_parallel": True}, ["expert_choice", "global"]),
]


def relative(got: object, wanted: object) -> float:
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30)) if wanted.size else 0.0


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Outcome]:
    return ranks.run(1, measure, ParallelConfig(), VARIANTS, timeout=120)[0]


@pytest.mark.parametrize("size, degrees, variants", CELLS, ids=lambda p: str(p).replace("'", ""))
def test_a_layout_is_the_same_model(ranks, one_rank, size, degrees, variants):
    chosen = {name: VARIANTS[name] for name in variants}
    every = ranks.run(size, measure, ParallelConfig(**degrees), chosen, timeout=120)
    for name in variants:
        got, wanted = every[0][name], one_rank[name]
        assert relative(got.losses, wanted.losses) < 1e-5
        assert relative(got.norms, wanted.norms) < 1e-5
        assert np.array_equal(got.load_SLE, wanted.load_SLE)
        assert np.array_equal(got.dropped_SL, wanted.dropped_SL)
        assert relative(got.router, wanted.router) < 1e-5
        assert relative(got.evaluation[0], wanted.evaluation[0]) < 1e-5 and got.evaluation[1] == wanted.evaluation[1]
        assert relative(got.logits_V, wanted.logits_V) < 1e-5
        assert got.gradients.keys() == wanted.gradients.keys()
        differences = {key: relative(got.gradients[key], whole) for key, whole in wanted.gradients.items()}
        assert max(differences.values()) <= 1e-5, differences
        for other in (result[name] for result in every[1:]):
            assert (other.losses, other.norms, other.evaluation) == (got.losses, got.norms, got.evaluation)
            assert np.array_equal(other.load_SLE, got.load_SLE) and np.array_equal(other.logits_V, got.logits_V)


def test_the_comparison_can_fail(ranks, one_rank):
    other = dataclasses.replace(VARIANTS["drops"], seed=2)
    got, wanted = ranks.run(1, measure, ParallelConfig(), {"drops": other}, timeout=120)[0]["drops"], one_rank["drops"]
    assert relative(got.losses, wanted.losses) > 1e-3
    assert relative(got.norms, wanted.norms) > 1e-3
    assert not np.array_equal(got.load_SLE, wanted.load_SLE)
    assert min(relative(got.gradients[key], whole) for key, whole in wanted.gradients.items()) > 1e-3


def test_the_variants_do_what_their_names_say(one_rank):
    choices = 32 * 4  # a layer's tokens of a step
    for name, (drops, layers, top_k) in {
        "drops": (True, 4, 2),
        "deepseek": (True, 4, 2),
        "dropless": (False, 2, 2),
        "switch": (True, 4, 1),
        "switch_documents": (True, 2, 1),
        "expert_choice": (False, 4, 1.5),
        "sinkhorn": (True, 4, 2),
        "global": (True, 2, 2),
    }.items():
        outcome = one_rank[name]
        assert (outcome.dropped_SL > 0).all() if drops else (outcome.dropped_SL == 0).all()
        assert outcome.load_SLE.sum(-1).tolist() == [[choices * top_k] * layers] * 3
    assert one_rank["dense"].load_SLE.size == 0


def test_the_gradient_norm_counts_every_element_once(one_rank):
    for outcome in one_rank.values():
        squares = sum(np.square(g.astype(np.float64)).sum() for g in outcome.gradients.values())
        assert relative(outcome.norms[0], np.sqrt(squares)) < 1e-6
        assert all(np.abs(g).max() > 0 for g in outcome.gradients.values())
