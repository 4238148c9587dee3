"""Rules of FP8 by TransformerEngine, and of what it computes in bf16."""

import pytest

from tests.conf.test_rules import FP8, SPARSE, assert_violation_has_a_suggestion_that_works, error_message, view

TE = {**FP8, "fp8.kernels": "te", "train.sequence_length": 64}
DELAYED = {**TE, "fp8.recipe": "delayed"}
LATENT = {"model.kv_lora_rank": 128, "model.hidden_size": 512, "model.qk_nope_head_dim": 64, "model.v_head_dim": 64}
SEQUENCE = {"parallel.tp": 2, "parallel.sequence_parallel": True, "train.micro_batch_size": 1}
ASKED = {"model.transformer_impl": "transformer_engine", "precision": "bf16", "lora.rank": 4}

# as tests.conf.test_rules.BROKEN
BROKEN = [
    ({**FP8, "fp8.recipe": "delayed"}, 1, "needs fp8.kernels=te, but it is auto", "fp8.recipe=tensorwise"),
    ({**FP8, "fp8.recipe": "mxfp8"}, 1, "needs fp8.kernels=te, but it is auto", "fp8.recipe=blockwise"),
    ({**TE, "fp8.recipe": "rowwise"}, 1, "mxfp8, but it is rowwise", "fp8.recipe=tensorwise"),
    ({**TE, "fp8.recipe": "mxfp8", "cluster.name": "h100"}, 1, "10.0 or newer, but cluster=h100", "recipe=blockwise"),
    ({**TE, "fp8.weight_gradient": "bf16"}, 1, "computes weight gradients in FP8", "fp8.weight_gradient=null"),
    ({**TE, "model.transformer_impl": "local"}, 1, "transformer_impl other than local", "model.transformer_impl=auto"),
    ({**TE, **SPARSE, "fp8.linear_layers": False}, 1, "needs fp8.linear_layers=true", "fp8.linear_layers=true"),
    ({**TE, "lora.rank": 4}, 1, "needs lora.rank=null", "lora.rank=null"),
    (
        {**TE, **SPARSE, "model.moe.expert_chunk_rows": 8},
        1,
        "needs model.moe.expert_chunk_rows=null",
        "model.moe.expert_chunk_rows=null",
    ),
    ({**DELAYED, "model.recompute": ["norm", "full"]}, 1, "amaxes would count twice", "model.recompute=[norm]"),
    ({**TE, "train.sequence_length": 20, "train.micro_batch_size": 1}, 1, "20 % 16 = 4", "train.sequence_length=16"),
    ({**TE, **LATENT, **SEQUENCE, "train.sequence_length": 48}, 2, "/ parallel.tp % 16 == 0", "sequence_length=32"),
    ({**DELAYED, **LATENT, "model.qk_rope_head_dim": 24}, 1, "24 % 16 = 8", "model.qk_rope_head_dim=16"),
    ({**ASKED, "model.kv_lora_rank": 8}, 1, "adapters read their outputs", "model.transformer_impl=auto"),
]


@pytest.mark.parametrize(("changes", "world_size", "numbers", "suggestion"), BROKEN, ids=lambda value: str(value)[:60])
def test_a_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion):
    assert_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion)


def test_a_gpu_without_fp8():
    message = error_message(view({**TE, "cluster.name": "a100"}))
    assert "needs compute capability 9.0 or newer, but cluster=a100 has 8.0; nearest: precision=bf16" in message


P2P = {"parallel.cp": 2, "parallel.cp_comm_type": "p2p", "precision": "bf16"}
VALID = [
    ({**P2P, "data.document_mask": True}, 2),
    ({**P2P, "model.attention_chunk_size": 8, "data.document_mask": True}, 2),
    ({**DELAYED, "model.recompute": ["norm"]}, 1),
    ({**DELAYED, **LATENT, "model.qk_rope_head_dim": 16}, 1),
]


@pytest.mark.parametrize(("changes", "world_size"), VALID, ids=lambda value: str(value)[:60])
def test_nothing_is_refused_that_works(changes, world_size):
    assert not error_message(view(changes, world_size))
