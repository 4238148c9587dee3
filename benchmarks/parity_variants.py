"""The models of the parity matrix (benchmarks.parity), by name."""

from benchmarks.tiny import Variant
from conf.schema import RopeScalingConfig

# Methods other than Switch's that decide over the whole micro-batch, or could depend on the order of its tokens.
DEEPSEEK = {"score_function": "sigmoid", "num_experts": 8, "num_expert_groups": 4, "top_k_groups": 2}
DEEPSEEK |= {"load_balancing": "seq_aux_loss", "drop_policy": "probability", "bias_update_rate": 0.01}
GLOBAL = {"load_balancing": "global_aux_loss", "jitter": 0.1, "drop_policy": "random", "every": 2}
GPT_OSS = {"sliding_window": 5, "full_attention_every": 2, "attention_sinks": True, "attention_bias": True}
GPT_OSS |= {"attention_output_bias": True, "activation": "clamped_swiglu"}
CHUNKS = {"attention_chunk_size": 5, "ffn_bias": True, "attention_sinks": True}
CHUNKS |= {"norm": "layernorm", "norm_zero_centered": True, "qk_norm": "full"}
CHUNKS |= {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
CHUNKS |= {"logit_multiplier": 0.5, "logit_softcap": 2.0}
ALIKE = {"document_mask": True, "begin_alike": True}
PACKED = {"document_mask": True, "packed": True}
LLAMA4 = {"attention_chunk_size": 5, "full_attention_every": 2, "no_rope_every": 2, "qk_norm": "l2"}
LLAMA4 |= {"attention_temperature": 0.5, "attention_temperature_tokens": 4, "rope_interleave": True}
GATED_INPUTS = {"score_function": "sigmoid", "renormalize": False, "gate_on": "input", "num_shared_experts": 1}
LONGROPE = RopeScalingConfig("longrope", original_max_position_embeddings=12, long_mscale=1.2)
LONGROPE.short_factor, LONGROPE.long_factor = [1.0, 1.0, 1.5, 2.0], [1.0, 2.0, 4.0, 8.0]
PHIMOE = {"norm": "layernorm", "head_bias": True, "rope_scaling": LONGROPE}
YARN = RopeScalingConfig("yarn", factor=4.0, original_max_position_embeddings=8, mscale_all_dim=1.0)
MLA = {"num_query_groups": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"rope_interleave": True}
MUON = {"name": "muon", "router_lr_scale": 0.3, "expert_lr_scale": 2.0}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
DORA = {"rank": 4, "alpha": 8.0, "dora": True}
LORA_EXPERTS = {"num_shared_experts": 1, "every": 2, "expert_bias": True, "expert_chunk_rows": 8}
MTP = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}
OVERLAP = {"overlap_degree": 2, "num_experts": 8}

VARIANTS = {
    "drops": Variant(),
    "dropless": Variant({"tie_embeddings": True}, {"capacity_factor": None, "every": 2}, document_mask=True),
    "switch": Variant({"tie_embeddings": True}, {"top_k": 1}),
    "switch_documents": Variant(moe={"top_k": 1, "every": 2}, document_mask=True),
    "deepseek": Variant(moe=DEEPSEEK),
    "expert_choice": Variant(moe={"load_balancing": "expert_choice", "capacity_factor": 0.75}),
    "sinkhorn": Variant(moe={"load_balancing": "sinkhorn", "jitter": 0.1, "drop_policy": "random"}),
    "global": Variant(moe=GLOBAL),
    "global_bias": Variant(moe=GLOBAL | {"bias_update_rate": 0.01}),
    "ties": Variant(moe={"drop_policy": "probability", "capacity_factor": 0.5}, **ALIKE),
    "ties_choice": Variant(moe={"load_balancing": "expert_choice", "top_k": 1, "capacity_factor": 0.5}, **ALIKE),
    "per_sequence": Variant(moe={"capacity_per": "sequence", "drop_policy": "probability"}),
    "qwen3": Variant({"head_dim": 12, "qk_norm": "head"}, {"ffn_hidden_size": 20, "first_dense_layers": 1}),
    "olmoe": Variant({"qk_norm": "full", "clip_qkv": 1.0}, optim={"router_lr_scale": 0.3, "expert_lr_scale": 2.0}),
    "qwen2": Variant({"attention_bias": True}, {"num_experts": 0}),
    "rope": Variant({"partial_rotary_factor": 0.5, "rope_interleave": True, "rope_scaling": YARN}),
    "mla": Variant(MLA | {"q_lora_rank": 20, "rope_scaling": YARN}, DEEPSEEK | {"num_shared_experts": 1}),
    "mla_documents": Variant(MLA, {"first_dense_layers": 1}, document_mask=True),
    "gpt_oss": Variant(GPT_OSS, {"softmax_order": "after", "router_bias": True, "expert_bias": True}),
    "llama4": Variant(LLAMA4, GATED_INPUTS, document_mask=True),
    "phimoe": Variant(PHIMOE, {"sparse_mixer_eps": 0.3}),
    "gated": Variant({"attention_output_gate": "head", "attention_bias": True, "qk_norm": "head"}, {"every": 2}),
    "gated_dense": Variant({"attention_output_gate": "elementwise", "head_dim": 12}, {"num_experts": 0}),
    "chunks": Variant(CHUNKS, {"num_experts": 0}, document_mask=True),
    "dense": Variant({"tie_embeddings": True}, {"num_experts": 0}),
    "muon": Variant(moe={"num_shared_experts": 1, "every": 4, "expert_bias": True}, optim=MUON),
    "muon_mla": Variant(MLA, {"num_experts": 8}, optim=MUON),
    "mtp": Variant({"mtp_num_layers": 1}, {"score_function": "sigmoid", "drop_policy": "probability"}),
    "mtp_documents": Variant(MTP | {"tie_embeddings": True}, {"bias_update_rate": 0.01}, document_mask=True),
    "mtp_latent": Variant(MLA | MTP, {"capacity_factor": None, "load_balancing": "seq_aux_loss"}),
    "dpo": Variant({"tie_embeddings": True}, objective="dpo"),
    "reward": Variant({"reward_head": True}, {"capacity_factor": None, "every": 2}, objective="reward"),
    "chat": Variant({"attention_sinks": True}, {"drop_policy": "probability", "bias_update_rate": 0.01}, **PACKED),
    "chat_mtp": Variant(MTP, {"load_balancing": "seq_aux_loss"}, **PACKED),
    "replay": Variant(moe={"score_function": "sigmoid", "num_experts": 8, "drop_policy": "probability"}, replay=True),
    "replay_mtp": Variant({"mtp_num_layers": 1}, {"every": 2}, replay=True),
    "lora": Variant({"attention_bias": True, "qk_norm": "head"}, LORA_EXPERTS, lora=LORA),
    "lora_mla": Variant(MLA | {"q_lora_rank": 20}, DEEPSEEK | {"num_shared_experts": 1}, lora=LORA),
    "lora_dense": Variant({"tie_embeddings": True, "recompute": ["activation"]}, {"num_experts": 0}, lora=LORA),
    "overlap": Variant({"recompute": ["activation"]}, DEEPSEEK | OVERLAP | {"num_shared_experts": 1, "top_k": 3}),
    "overlap_padded": Variant(
        {"recompute": ["moe"]}, OVERLAP | {"pad_to_capacity": True, "expert_dropout": 0.4, "expert_bias": True}
    ),
    "overlap_lora": Variant({"recompute": ["full"]}, OVERLAP | LORA_EXPERTS | {"gate_on": "input"}, lora=LORA),
    "dora": Variant({"attention_output_gate": "head"}, {"num_experts": 0}, lora=DORA),
    "dora_mla": Variant(MLA | {"q_lora_rank": 20}, {"num_experts": 0}, lora=DORA),
    "six_layers": Variant({"num_layers": 6, "tie_embeddings": True}, {"top_k": 2}),
}
