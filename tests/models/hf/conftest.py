from pathlib import Path

import pytest

from parallel.local_launcher import RankPool
from tests.models.hf.helpers import LENGTH, run_import, save_by_hand, save_model
from tests.training.helpers import write_corpus

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1}
DEEPSEEK = {**LATENT, **EXPERTS, "num_key_value_heads": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
DEEPSEEK_PLAIN = {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
DEEPSEEK_PLAIN |= {"routed_scaling_factor": 1.0}
DEEPSEEK_V3 = {**DEEPSEEK, "num_mtp_layers": 0, "first_k_dense_replace": 1}
DEEPSEEK_V3 |= {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}}
DEEPSEEK_V3_PLAIN = {
    **DEEPSEEK,
    **DEEPSEEK_PLAIN,
    "num_mtp_layers": 0,
    "norm_topk_prob": False,
    "rope_interleave": False,
}
DEEPSEEK_V2 = {**DEEPSEEK, "first_k_dense_replace": 1, "n_shared_experts": 2, "topk_method": "group_limited_greedy"}
DEEPSEEK_V2 |= {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
DEEPSEEK_V2_PLAIN = {**DEEPSEEK, **DEEPSEEK_PLAIN, "topk_method": "greedy"}
HALF = PLAIN | {"partial_rotary_factor": 0.5}
GLM4 = {**EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "num_mtp_layers": 0, "head_dim": 12}
GLM4 |= {"use_qk_norm": True, "attention_bias": True, "rope_parameters": HALF}
GLM4_PLAIN = {**EXPERTS, "num_mtp_layers": 0, "norm_topk_prob": False, "head_dim": 8, "first_k_dense_replace": 0}
GLM4_PLAIN |= {"rope_parameters": PLAIN | {"partial_rotary_factor": 1.0}}
ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 2}
ERNIE |= {"pad_token_id": None, "head_dim": 12, "rope_parameters": PLAIN, "use_bias": True}
ERNIE_PLAIN = {**ERNIE, "use_bias": False, "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "head_dim": 8}
ERNIE_PLAIN |= {"tie_word_embeddings": False, "moe_layer_interval": 2}
MINIMAX = {"num_experts_per_tok": 2, "head_dim": 12, "rope_parameters": HALF}
MINIMAX_PLAIN = {"num_experts_per_tok": 2, "head_dim": 8, "rope_parameters": PLAIN}

WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
LONGROPE = {"rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": LENGTH}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 1.5, 3.0, 8.0]}
LONGROPE |= {"short_mscale": 1.1, "long_mscale": 1.24}
PHIMOE = {"attention_bias": True, "lm_head_bias": True, "sliding_window": 20, "rope_parameters": LONGROPE}
PHIMOE |= {"router_jitter_noise": 0.3, "num_local_experts": 4, "router_aux_loss_coef": 0.0}
PHIMOE_PLAIN = {"router_jitter_noise": 0.3, "num_local_experts": 4, "router_aux_loss_coef": 0.0}
PHIMOE_PLAIN |= {"tie_word_embeddings": True, "rope_parameters": PLAIN}
LLAMA4 = {"num_hidden_layers": 4, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 |= {"attention_chunk_size": 20, "no_rope_layer_interval": 2, "floor_scale": 8, "attn_scale": 0.5}
LLAMA4 |= {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "attention_bias": True}
LLAMA4 |= {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}
LLAMA4_PLAIN = {"head_dim": 8, "num_local_experts": 4, "use_qk_norm": False, "attn_temperature_tuning": False}
LLAMA4_PLAIN |= {"no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2, "rope_parameters": PLAIN}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("hf_corpus"))


@pytest.fixture(scope="session")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of Transformers' models, by a name. Nobody changes them."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    moe = {"num_local_experts": 4, "router_aux_loss_coef": 0.0}
    return {
        "mixtral": save_model("Mixtral", folder / "mixtral", corpus, sliding_window=20, **moe),
        "llama": save_model(
            "Llama",
            folder / "llama",
            corpus,
            **{"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 300.0}},
            **{"attention_bias": True, "mlp_bias": True},
        ),
        "llama_plain": save_model("Llama", folder / "llama_plain", corpus),
        "qwen3": save_model(
            "Qwen3", folder / "qwen3", corpus, head_dim=12, rope_parameters=YARN, attention_bias=True, **WINDOW
        ),
        "qwen3_plain": save_model("Qwen3", folder / "qwen3_plain", corpus, head_dim=8),
        "qwen3_moe": save_model(
            "Qwen3Moe",
            folder / "qwen3_moe",
            corpus,
            **{"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
            **{"mlp_only_layers": [0], "norm_topk_prob": True, "router_aux_loss_coef": 0.0},
            **{"attention_bias": True, "use_sliding_window": True, "sliding_window": 20},
        ),
        "olmoe": save_model(
            "Olmoe",
            folder / "olmoe",
            corpus,
            **{"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0, "clip_qkv": 1.5},
            attention_bias=True,
        ),
        "qwen2": save_model("Qwen2", folder / "qwen2", corpus, **WINDOW),
        "qwen2_plain": save_model("Qwen2", folder / "qwen2_plain", corpus),
        "qwen2_moe": save_model(
            "Qwen2Moe",
            folder / "qwen2_moe",
            corpus,
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "decoder_sparse_step": 2},
            **{"shared_expert_intermediate_size": 24, "router_aux_loss_coef": 0.0},
            **{"use_sliding_window": True, "sliding_window": 20},
        ),
        "gpt_oss": save_model(
            "GptOss",
            folder / "gpt_oss",
            corpus,
            **{
                "head_dim": 12,
                "num_experts_per_tok": 2,
                "sliding_window": 10,
                "swiglu_alpha": 1.5,
                "swiglu_limit": 1.1,
            },
            **{"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": YARN, **moe},
        ),
        "gpt_oss_plain": save_model(
            "GptOss",
            folder / "gpt_oss_plain",
            corpus,
            **{"head_dim": 8, "num_experts_per_tok": 2, "attention_bias": False, "rope_parameters": PLAIN, **moe},
            layer_types=["full_attention"] * 2,
        ),
        "granitemoe": save_model(
            "GraniteMoe",
            folder / "granitemoe",
            corpus,
            **{"attention_bias": True, "tie_word_embeddings": True, "attention_multiplier": 0.2, **moe},
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 8.0},
        ),
        "granitemoe_plain": save_model("GraniteMoe", folder / "granitemoe_plain", corpus, **moe),
        "deepseek_v3": save_model("DeepseekV3", folder / "deepseek_v3", corpus, **DEEPSEEK_V3),
        "deepseek_v3_plain": save_model("DeepseekV3", folder / "deepseek_v3_plain", corpus, **DEEPSEEK_V3_PLAIN),
        "deepseek_v2": save_model("DeepseekV2", folder / "deepseek_v2", corpus, **DEEPSEEK_V2),
        "deepseek_v2_plain": save_model("DeepseekV2", folder / "deepseek_v2_plain", corpus, **DEEPSEEK_V2_PLAIN),
        "glm4_moe": save_model("Glm4Moe", folder / "glm4_moe", corpus, **GLM4),
        "glm4_moe_plain": save_model("Glm4Moe", folder / "glm4_moe_plain", corpus, **GLM4_PLAIN),
        "minimax_m2": save_model("MiniMaxM2", folder / "minimax_m2", corpus, **MINIMAX, **moe),
        "minimax_m2_plain": save_model("MiniMaxM2", folder / "minimax_m2_plain", corpus, **MINIMAX_PLAIN, **moe),
        "ernie4_5_moe": save_model("Ernie4_5_Moe", folder / "ernie4_5_moe", corpus, **ERNIE),
        "ernie4_5_moe_plain": save_model("Ernie4_5_Moe", folder / "ernie4_5_moe_plain", corpus, **ERNIE_PLAIN),
        "llama4": save_model("Llama4", folder / "llama4", corpus, **LLAMA4),
        "llama4_plain": save_model("Llama4", folder / "llama4_plain", corpus, **LLAMA4_PLAIN),
        "phimoe": save_model("Phimoe", folder / "phimoe", corpus, **PHIMOE),
        "phimoe_plain": save_model("Phimoe", folder / "phimoe_plain", corpus, **PHIMOE_PLAIN),
        "hub": save_by_hand(folder / "hub"),
    }


class Runs(dict[str, Path]):
    """The runs that sources are imported as, each compared with its source when it is first asked for."""

    def __init__(self, sources: dict[str, Path], ranks: RankPool, folder: Path):
        super().__init__()
        self.sources, self.ranks, self.folder = sources, ranks, folder

    def __missing__(self, name: str) -> Path:
        code, printed = run_import(self.ranks, self.sources[name], self.folder / name)
        assert code == 0 and "verified on" in printed, printed
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="session")
def runs(sources: dict[str, Path], ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(sources, ranks, tmp_path_factory.mktemp("hf_runs"))
