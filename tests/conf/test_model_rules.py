"""Rules of the widths of a model, of its attention, and of Muon."""

import pytest

from tests.conf.test_rules import FP8, SPARSE, assert_violation_has_a_suggestion_that_works

TE = {"model.transformer_impl": "transformer_engine", "precision": "bf16"}
CP = {"parallel.cp": 2, "precision": "bf16"}
P2P, A2A = {**CP, "parallel.cp_comm_type": "p2p"}, {**CP, "parallel.cp_comm_type": "a2a"}
GATHER = "parallel.cp_comm_type=all_gather"
LATENT = {"model.kv_lora_rank": 128}
MIXER = {"model.moe.top_k": 2, "model.moe.sparse_mixer_eps": 0.01}
YARN = {"model.rope_scaling.type": "yarn", "model.rope_scaling.original_max_position_embeddings": 64}

# as tests.conf.test_rules.BROKEN
BROKEN = [
    ({**TE, "precision": "fp32"}, 1, "computes in bf16, but precision is fp32", "precision=bf16"),
    ({**TE, "model.recompute": ["norm", "moe"], **SPARSE}, 1, "but it is [norm,moe]", "model.recompute=[moe]"),
    ({**TE, "lora.rank": 4}, 1, "adapters read their outputs", "model.transformer_impl=auto"),
    ({**TE, "cluster.name": "cpu"}, 1, "needs GPUs, but cluster=cpu has none", "model.transformer_impl=auto"),
    (
        {"model.transformer_impl": "local", "model.moe.backend": "te", **SPARSE},
        1,
        "model.moe.backend=te needs model.transformer_impl other than local",
        "model.transformer_impl=auto",
    ),
    ({"model.transformer_impl": "te"}, 1, "transformer_impl is one of", "model.transformer_impl=transformer_engine"),
    ({**P2P, "precision": "fp32"}, 2, "computes in bf16, but precision is fp32", "precision=bf16"),
    ({**P2P, "cluster.name": "cpu"}, 2, "needs GPUs, but cluster=cpu has none", GATHER),
    ({**P2P, "model.transformer_impl": "local"}, 2, "transformer_impl other than local", "model.transformer_impl=auto"),
    ({**P2P, "model.sliding_window": 8}, 2, "needs model.sliding_window=null", "parallel.cp_comm_type=a2a"),
    ({**P2P, "model.attention_sinks": True}, 2, "needs model.attention_sinks=false", "parallel.cp_comm_type=a2a"),
    ({**A2A, "model.num_query_groups": 1}, 2, "model.num_query_groups % (parallel.tp * parallel.cp)", "comm_type=p2p"),
    ({**P2P, "parallel.cp": 1}, 2, "cp_comm_type needs parallel.cp > 1", GATHER),
    ({"model.hidden_size": 250}, 1, "250 % 4 = 2", "model.head_dim=62"),
    (
        {"optim.router_lr_scale": 0.3, "model.moe.num_experts": 0},
        1,
        "router_lr_scale needs model.moe.num_experts > 0",
        "optim.router_lr_scale=1.0",
    ),
    ({"optim.expert_lr_scale": 0.3, "lora.rank": 4}, 1, "lora.rank=null, which trains", "optim.expert_lr_scale=1.0"),
    ({"optim.muon_momentum": 0.9}, 1, "muon_momentum needs optim.name=muon", "optim.muon_momentum=0.95"),
    (
        {"optim.name": "muon", "optim.muon_split_qkv": False, **LATENT},
        1,
        "muon_split_qkv needs optim.name=muon and model.kv_lora_rank=null",
        "optim.muon_split_qkv=true",
    ),
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
    ({"model.mtp_num_layers": 64, "train.sequence_length": 64}, 1, "64 >= 64", "model.mtp_num_layers=63"),
    ({"model.mtp_num_layers": -1}, 1, "model.mtp_num_layers >= 0, but it is -1", "model.mtp_num_layers=0"),
    ({"model.mtp_loss_scaling_factor": 0.3}, 1, "needs model.mtp_num_layers > 0", "mtp_loss_scaling_factor=0.1"),
    ({"model.clip_qkv": 0.0}, 1, "model.clip_qkv > 0, but it is 0.0", "model.clip_qkv=null"),
    ({"model.qk_norm": "heads"}, 1, "model.qk_norm is one of null, head, full, l2, but heads", "model.qk_norm=head"),
    ({"model.full_attention_every": 2}, 1, "needs model.sliding_window or", "model.full_attention_every=null"),
    ({"model.sliding_window": 8, "model.attention_chunk_size": 8}, 1, "they are 8 and 8", "attention_chunk_size=null"),
    ({"model.sliding_window": 8, "model.first_full_attention_layers": 4}, 1, "4 of 4 layers", "layers=3"),
    ({"model.sliding_window": 8, "model.full_attention_every": 1}, 1, "full_attention_every >= 2", "every=2"),
    (
        {"model.rope_scaling.type": "longrope", "model.rope_scaling.original_max_position_embeddings": 64},
        1,
        "needs model.rope_scaling.short_factor of 32 positive numbers, one for each frequency, but it is []",
        "model.rope_scaling.type=null",
    ),
    ({"model.rope_scaling.long_mscale": 2.0}, 1, "needs model.rope_scaling.type=longrope", "long_mscale=1.0"),
    ({**SPARSE, **MIXER, "model.moe.renormalize": True}, 1, "needs model.moe.sparse_mixer_eps=null", "normalize=null"),
    (
        {**SPARSE, **MIXER, "model.moe.score_function": "sigmoid"},
        1,
        "sparse_mixer_eps needs model.moe.score_function=softmax",
        "model.moe.sparse_mixer_eps=null",
    ),
    ({"model.attention_output_gate": "heads"}, 1, "is one of null, head, elementwise, but heads", "output_gate=head"),
    ({**LATENT, "model.attention_output_gate": "head"}, 1, "output_gate needs model.kv_lora_rank=null", "gate=null"),
    ({"model.no_rope_every": 5}, 1, "model.no_rope_every <= model.num_layers, but 5 > 4", "model.no_rope_every=null"),
    ({"model.no_rope_every": 1}, 1, "model.no_rope_every >= 2, but it is 1", "model.no_rope_every=2"),
    ({"model.attention_temperature": 0.1}, 1, "needs model.no_rope_every", "model.attention_temperature=null"),
    ({"model.attention_temperature_tokens": 9}, 1, "needs model.attention_temperature", "temperature_tokens=8192"),
    ({"model.moe.gate_on": "input"}, 1, "gate_on needs model.moe.num_experts > 0", "gate_on=output"),
    ({**LATENT, "model.no_rope_every": 2}, 1, "no_rope_every needs model.kv_lora_rank=null", "no_rope_every=null"),
    ({"model.moe.router_bias": True}, 1, "router_bias needs model.moe.num_experts > 0", "router_bias=false"),
    ({"model.head_dim": 63}, 1, "model.head_dim is even (rotary embeddings rotate pairs), but it is 63", "head_dim=64"),
    ({"model.partial_rotary_factor": 1.5}, 1, "partial_rotary_factor > 0 and <= 1", "partial_rotary_factor=1.0"),
    (
        {"model.partial_rotary_factor": 0.3, "model.head_dim": 10},
        1,
        "the size of a head is even (rotary embeddings rotate pairs) and positive, but it",
        "model.partial_rotary_factor=0.2",
    ),
    (
        {"model.rope_scaling.type": "liner"},
        1,
        "is one of null, linear, llama3, yarn, longrope, but liner",
        "scaling.type=linear",
    ),
    ({"model.rope_scaling.factor": 2.0}, 1, "needs model.rope_scaling.type=linear, llama3 or yarn", "factor=1.0"),
    ({"model.rope_scaling.factor": 0.5}, 1, "model.rope_scaling.factor >= 1, but it is 0.5", "factor=1"),
    ({"model.rope_scaling.beta_fast": 2.0}, 1, "beta_fast needs model.rope_scaling.type=yarn", "beta_fast=32.0"),
    (
        {"model.rope_scaling.type": "llama3"},
        1,
        "type=llama3 needs model.rope_scaling.original_max_position_embeddings",
        "model.rope_scaling.type=null",
    ),
    ({**YARN, "model.rope_scaling.mscale": 1.0}, 1, "mscale needs model.rope_scaling.mscale_all_dim", "mscale=null"),
    ({**YARN, "model.rope_scaling.beta_slow": 64.0}, 1, "beta_slow <= model.rope_scaling.beta_fast", "beta_fast=64.0"),
    ({**YARN, "model.rope_theta": 0.5}, 1, "type=yarn needs model.rope_theta > 1", "model.rope_theta=10000.0"),
    (
        {**YARN, "model.rope_scaling.type": "llama3", "model.rope_scaling.low_freq_factor": 5.0},
        1,
        "low_freq_factor <= model.rope_scaling.high_freq_factor, but 5 > 4",
        "high_freq_factor=20.0",
    ),
    ({"model.q_lora_rank": 8}, 1, "model.q_lora_rank needs model.kv_lora_rank", "model.q_lora_rank=null"),
    ({"model.v_head_dim": 64}, 1, "model.v_head_dim needs model.kv_lora_rank", "model.v_head_dim=128"),
    ({**LATENT, "model.qk_norm": "head"}, 1, "model.qk_norm needs model.kv_lora_rank=null", "model.qk_norm=null"),
    ({**LATENT, "model.num_query_groups": 2}, 1, "groups needs model.kv_lora_rank=null", "num_query_groups=null"),
    ({**LATENT, "model.qk_rope_head_dim": 9}, 1, "model.qk_rope_head_dim is even", "model.qk_rope_head_dim=10"),
    (
        {**LATENT, "model.v_head_dim": 193},
        1,
        "model.v_head_dim <= model.qk_nope_head_dim + model.qk_rope_head_dim",
        "model.v_head_dim=192 or model.qk_nope_head_dim=129",
    ),
    (
        {**LATENT, **FP8, "model.kv_lora_rank": 192},
        1,
        "with precision=fp8, model.kv_lora_rank % 128 == 0, but 192 % 128 = 64",
        "model.kv_lora_rank=128",
    ),
    (
        {**LATENT, **FP8, "model.v_head_dim": 64, "parallel.tp": 4},
        4,
        "the width of values % (128 * parallel.tp) == 0, but 256 % 512 = 256",
        "parallel.tp=2",
    ),
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
