"""Rules of the widths of a model and of its attention."""

import pytest

from tests.conf.test_rules import FP8, SPARSE, assert_violation_has_a_suggestion_that_works

# as tests.conf.test_rules.BROKEN
BROKEN = [
    ({"model.hidden_size": 250}, 1, "250 % 4 = 2", "model.head_dim=62"),
    ({"model.moe.ffn_hidden_size": 6}, 1, "ffn_hidden_size needs model.moe.num_experts > 0", "ffn_hidden_size=null"),
    (
        {"model.moe.shared_ffn_hidden_size": 6, **SPARSE},
        1,
        "shared_ffn_hidden_size needs model.moe.num_shared_experts > 0",
        "model.moe.shared_ffn_hidden_size=null",
    ),
    ({"model.moe.ffn_hidden_size": 0, **SPARSE}, 1, "model.moe.ffn_hidden_size >= 1", "model.moe.ffn_hidden_size=1"),
    (
        {"model.moe.ffn_hidden_size": 65, "parallel.etp": 2, **SPARSE},
        2,
        "model.moe.ffn_hidden_size % parallel.etp == 0, but 65 % 2 = 1",
        "model.moe.ffn_hidden_size=64",
    ),
    (
        {"model.moe.ffn_hidden_size": 65, "model.moe.num_shared_experts": 1, "parallel.tp": 2, **SPARSE},
        2,
        "model.moe.ffn_hidden_size % parallel.tp == 0, but 65 % 2 = 1",
        "model.moe.ffn_hidden_size=64",
    ),
    (
        {**FP8, **SPARSE, "model.moe.ffn_hidden_size": 64},
        1,
        "model.moe.ffn_hidden_size % (128 *",
        "ffn_hidden_size=128",
    ),
    ({"model.moe.first_dense_layers": 1}, 1, "needs model.moe.num_experts > 0", "model.moe.first_dense_layers=0"),
    ({"model.moe.first_dense_layers": -1, **SPARSE}, 1, ">= 0, but it is -1", "model.moe.first_dense_layers=0"),
    (
        {"model.moe.first_dense_layers": 4, "model.moe.every": 2, **SPARSE},
        1,
        "4 > 3, so no layer would have experts",
        "model.moe.first_dense_layers=3 or model.num_layers=6",
    ),
    (
        {**FP8, **SPARSE, "model.moe.first_dense_layers": 3, "fp8.linear_layers": False, "fp8.last_layers_high": 1},
        1,
        "no layer in FP8 has experts",
        "fp8.linear_layers=true",
    ),
    ({"model.clip_qkv": 0.0}, 1, "model.clip_qkv > 0, but it is 0.0", "model.clip_qkv=null"),
    ({"model.qk_norm": "heads"}, 1, "model.qk_norm is one of null, head, full, but heads", "model.qk_norm=head"),
    ({"model.head_dim": 63}, 1, "model.head_dim is even (rotary embeddings rotate pairs), but it is 63", "head_dim=64"),
    ({"model.head_dim": 0}, 1, "model.head_dim >= 1, but it is 0", "model.head_dim=1"),
    ({**FP8, "model.hidden_size": 192, "model.head_dim": 64}, 1, "model.hidden_size % 128 == 0", "hidden_size=128"),
    (
        {**FP8, "model.hidden_size": 128, "model.head_dim": 48, "parallel.tp": 2},
        2,
        "the width of queries % (128 * parallel.tp) == 0, but 192 % 256",
        "precision=bf16",
    ),
    ({**FP8, "model.head_dim": 48}, 1, "the width of queries % (128 * parallel.tp) == 0, but 192", "bf16"),
]


@pytest.mark.parametrize(("changes", "world_size", "numbers", "suggestion"), BROKEN, ids=lambda value: str(value)[:60])
def test_violation_of_a_model(changes, world_size, numbers, suggestion):
    assert_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion)
