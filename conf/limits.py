"""Choices and bounds of the settings, from the schema, and the conditions under which a setting has an effect."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from conf.config_view import WORLD_SIZE
from conf.extensions import schedule_reads, takes_files, yields_documents
from conf.schema import Config, ModelConfig, ParallelConfig
from conf.setting import Bounds


def _fields(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """The dotted key and the field of every setting."""
    for field in dataclasses.fields(section):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


CHOICES: dict[str, tuple[Any, ...]] = {
    key: field.metadata["choices"] for key, field in _fields(Config) if "choices" in field.metadata
}
BOUNDS: dict[str, Bounds] = {
    key: field.metadata["bounds"] for key, field in _fields(Config) if "bounds" in field.metadata
} | {WORLD_SIZE: Bounds(ge=1)}
MODEL_SETTINGS: dict[str, dataclasses.Field[Any]] = dict(_fields(ModelConfig, "model."))

ALTERNATIVES = {
    ("fp8.recipe", "current"): ("tensorwise", "is called tensorwise here"),
    ("precision", "fp16"): ("bf16", "is not available"),
    ("model.transformer_impl", "te"): ("transformer_engine", "is called transformer_engine, as in Megatron-Core"),
    ("model.moe.backend", "triton_fp8"): (
        "auto",
        "is asked for by precision=fp8 fp8.kernels=triton, and fp8.linear_layers=false for the experts alone",
    ),
}
"""(setting, value that it does not have) -> the value to suggest instead of the most similarly spelled one, and why."""


_NOT_CHOSEN = ("auto", "overlap_grad_reduce", "overlap_param_gather")
"""Settings of parallel that parallel.auto leaves as they are."""


def has_chats(cfg: Any) -> bool:
    """Whether the data are conversations, all of them or a part."""
    kind = cfg["data.kind"]
    return kind == "chat" or (kind == "blend" and any(part.kind == "chat" for part in cfg["data.blend"]))


def _min_sharding(cfg: Any) -> float:
    """Over how many ranks of a pipeline stage the parameters with the most replicas are sharded."""
    experts = cfg["parallel.etp"] * cfg["parallel.ep"] if cfg["model.moe.num_experts"] else math.inf
    return min(cfg["parallel.tp"], experts)


CONDITIONS: list[tuple[str, Callable[[Any], bool], str]] = [
    # (condition as text, condition as code, settings that have no effect unless it holds)
    ("data=chat or a part of kind chat", has_chats, "data.packing data.too_long data.chat_template"),
    (
        "data other than chat and preference",
        lambda c: c["data.kind"] not in ("chat", "preference"),
        "data.packing_strategy",
    ),
    ("lora.rank", lambda c: c["lora.rank"] is not None, "lora.alpha lora.rslora lora.dora lora.dropout lora.target"),
    (
        "parallel.auto=false",
        lambda c: not c["parallel.auto"],
        " ".join(
            f"parallel.{field.name}" for field in dataclasses.fields(ParallelConfig) if field.name not in _NOT_CHOSEN
        ),
    ),
    ("parallel.tp > 1", lambda c: c["parallel.tp"] > 1, "parallel.sequence_parallel"),
    ("parallel.cp > 1", lambda c: c["parallel.cp"] > 1, "parallel.cp_comm_type"),
    ("parallel.pp > 1", lambda c: c["parallel.pp"] > 1, "parallel.vpp parallel.pp_layers parallel.pp_layout"),
    (
        "data parallelism",
        lambda c: c["world_size"] > c["parallel.pp"] * _min_sharding(c),
        "parallel.overlap_grad_reduce parallel.overlap_param_gather",
    ),
    (
        "model.kv_lora_rank",
        lambda c: c["model.kv_lora_rank"] is not None,
        "model.q_lora_rank model.qk_nope_head_dim model.qk_rope_head_dim model.v_head_dim",
    ),
    (
        "model.kv_lora_rank=null",
        lambda c: c["model.kv_lora_rank"] is None,
        "model.num_query_groups model.head_dim model.qk_norm model.attention_bias model.clip_qkv "
        "model.partial_rotary_factor model.attention_output_bias model.attention_sinks "
        "model.attention_multiplier model.norm_zero_centered model.no_rope_every "
        "model.attention_output_gate",
    ),
    (
        "model.no_rope_every",
        lambda c: c["model.no_rope_every"] is not None,
        "model.attention_temperature",
    ),
    (
        "model.attention_temperature",
        lambda c: c["model.attention_temperature"] is not None,
        "model.attention_temperature_tokens",
    ),
    (
        "model.rope_scaling.type=linear, llama3 or yarn",
        lambda c: c["model.rope_scaling.type"] in ("linear", "llama3", "yarn"),
        "model.rope_scaling.factor",
    ),
    (
        "model.rope_scaling.type=llama3, yarn or longrope",
        lambda c: c["model.rope_scaling.type"] in ("llama3", "yarn", "longrope"),
        "model.rope_scaling.original_max_position_embeddings",
    ),
    (
        "model.rope_scaling.type=llama3",
        lambda c: c["model.rope_scaling.type"] == "llama3",
        "model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor",
    ),
    (
        "model.rope_scaling.type=yarn",
        lambda c: c["model.rope_scaling.type"] == "yarn",
        "model.rope_scaling.beta_fast model.rope_scaling.beta_slow model.rope_scaling.truncate "
        "model.rope_scaling.attention_factor model.rope_scaling.mscale_all_dim",
    ),
    (
        "model.rope_scaling.type=longrope",
        lambda c: c["model.rope_scaling.type"] == "longrope",
        "model.rope_scaling.short_factor model.rope_scaling.long_factor model.rope_scaling.short_mscale "
        "model.rope_scaling.long_mscale",
    ),
    (
        "model.rope_scaling.mscale_all_dim",
        lambda c: bool(c["model.rope_scaling.mscale_all_dim"]),
        "model.rope_scaling.mscale",
    ),
    (
        "model.moe.num_experts > 0",
        lambda c: c["model.moe.num_experts"] > 0,
        # Not `every`: num_experts=0 alone must turn a sparse preset into its dense counterpart.
        "parallel.ep parallel.etp model.moe.top_k model.moe.score_function model.moe.softmax_order "
        "model.moe.renormalize model.moe.routed_scaling_factor model.moe.num_expert_groups model.moe.capacity_factor "
        "model.moe.eval_capacity_factor model.moe.aux_loss_coeff model.moe.load_balancing model.moe.z_loss_coeff "
        "model.moe.bias_update_rate model.moe.jitter model.moe.force_balance model.moe.backend model.moe.expert_bias "
        "model.moe.num_shared_experts model.moe.expert_dropout model.moe.expert_chunk_rows "
        "model.moe.ffn_hidden_size model.moe.first_dense_layers model.moe.router_bias model.moe.gate_on "
        "model.moe.sparse_mixer_eps",
    ),
    (
        "model.moe.score_function=softmax",
        lambda c: c["model.moe.score_function"] == "softmax",
        "model.moe.softmax_order",
    ),
    (
        "model.moe.softmax_order=before",
        lambda c: c["model.moe.softmax_order"] == "before",
        "model.moe.renormalize model.moe.bias_update_rate",
    ),
    (
        "model.moe.sparse_mixer_eps=null",
        lambda c: c["model.moe.sparse_mixer_eps"] is None,
        "model.moe.renormalize model.moe.softmax_order model.moe.bias_update_rate model.moe.num_expert_groups",
    ),
    (
        "model.moe.score_function=softmax, and model.moe.load_balancing by a loss",
        lambda c: (
            c["model.moe.score_function"] == "softmax"
            and c["model.moe.load_balancing"] not in ("sinkhorn", "expert_choice")
        ),
        "model.moe.sparse_mixer_eps",
    ),
    (
        "model.moe.num_experts > 0 and a capacity factor",
        lambda c: (
            c["model.moe.num_experts"] > 0
            and (c["model.moe.capacity_factor"] or c["model.moe.eval_capacity_factor"]) is not None
        ),
        "model.moe.drop_policy",
    ),
    (
        "model.moe.num_experts > 0 and model.moe.capacity_factor",
        lambda c: c["model.moe.num_experts"] > 0 and c["model.moe.capacity_factor"] is not None,
        "model.moe.pad_to_capacity",
    ),
    (
        "model.moe.num_shared_experts > 0",
        lambda c: c["model.moe.num_shared_experts"] > 0,
        "model.moe.shared_expert_gate model.moe.shared_ffn_hidden_size",
    ),
    ("parallel.ep > 1", lambda c: c["parallel.ep"] > 1, "model.moe.dispatcher model.moe.overlap_degree"),
    ("model.mtp_num_layers > 0", lambda c: c["model.mtp_num_layers"] > 0, "model.mtp_loss_scaling_factor"),
    (
        "model.activation=clamped_swiglu",
        lambda c: c["model.activation"] == "clamped_swiglu",
        "model.swiglu_alpha model.swiglu_limit",
    ),
    (
        "model.sliding_window or model.attention_chunk_size",
        lambda c: (c["model.sliding_window"] or c["model.attention_chunk_size"]) is not None,
        "model.full_attention_every model.first_full_attention_layers",
    ),
    (
        "model.moe.load_balancing=aux_loss, seq_aux_loss or global_aux_loss",
        lambda c: c["model.moe.load_balancing"] not in ("sinkhorn", "expert_choice"),
        "model.moe.aux_loss_coeff model.moe.bias_update_rate model.moe.num_expert_groups model.moe.force_balance",
    ),
    (
        "model.moe.load_balancing other than expert_choice",
        lambda c: c["model.moe.load_balancing"] != "expert_choice",
        "model.moe.softmax_order model.moe.renormalize model.moe.drop_policy model.moe.eval_capacity_factor",
    ),
    (
        "model.moe.num_expert_groups > 1",
        lambda c: c["model.moe.num_expert_groups"] > 1,
        "model.moe.top_k_groups model.moe.group_score",
    ),
    (
        "a load-balancing loss, with model.moe.bias_update_rate or model.moe.num_expert_groups > 1",
        lambda c: (
            c["model.moe.load_balancing"] in ("aux_loss", "seq_aux_loss", "global_aux_loss")
            and (c["model.moe.bias_update_rate"] is not None or c["model.moe.num_expert_groups"] > 1)
        ),
        "model.moe.aux_loss_counts",
    ),
    (
        "model.moe.load_balancing other than expert_choice, and a capacity factor",
        lambda c: (
            c["model.moe.load_balancing"] != "expert_choice"
            and not (c["model.moe.capacity_factor"] is None and c["model.moe.eval_capacity_factor"] is None)
        ),
        "model.moe.capacity_per",
    ),
    (
        "precision=fp8",
        lambda c: c["precision"] == "fp8",
        "fp8.kernels fp8.recipe fp8.weight_gradient fp8.linear_layers fp8.first_layers_high fp8.last_layers_high",
    ),
    (
        "precision=fp8 and fp8.kernels=te",
        lambda c: c["precision"] == "fp8" and c["fp8.kernels"] == "te",
        "fp8.format",
    ),
    (
        "precision=fp8 and fp8.recipe=delayed",
        lambda c: c["precision"] == "fp8" and c["fp8.recipe"] == "delayed",
        "fp8.amax_history_len fp8.amax_compute_algo",
    ),
    (
        "a layer in bf16 (precision, fp8.first_layers_high)",
        lambda c: (
            c["precision"] != "fp8"
            or c["fp8.first_layers_high"] + c["fp8.last_layers_high"] + c["model.mtp_num_layers"] > 0
        ),
        "model.moe.backend",
    ),
    (
        "train.objective=dpo",
        lambda c: c["train.objective"] == "dpo",
        "preference.loss",
    ),
    (
        "train.objective=dpo or another on pairs",
        lambda c: c["train.objective"] not in ("language_modeling", "reward"),
        "preference.beta preference.label_smoothing",
    ),
    ("preference.loss other than ipo", lambda c: c["preference.loss"] != "ipo", "preference.label_smoothing"),
    (
        "train.objective=reward",
        lambda c: c["train.objective"] == "reward",
        "preference.max_responses preference.center_rewards_coefficient",
    ),
    ("data other than preference", lambda c: c["data.kind"] != "preference", "data.document_mask"),
    ("parameters in bf16 (precision)", lambda c: c["precision"] != "fp32", "optim.grad_dtype"),
    (
        "model.moe.num_experts > 0 and lora.rank=null, which trains routers and experts",
        lambda c: c["model.moe.num_experts"] > 0 and c["lora.rank"] is None,
        "optim.router_lr_scale optim.expert_lr_scale",
    ),
    ("optim.name=muon", lambda c: c["optim.name"] == "muon", "optim.muon_momentum"),
    (
        "optim.name=muon and model.kv_lora_rank=null",
        lambda c: c["optim.name"] == "muon" and c["model.kv_lora_rank"] is None,
        "optim.muon_split_qkv",
    ),
    (
        "optim.schedule=wsd",
        lambda c: schedule_reads(c["optim.schedule"], "decay_fraction"),
        "optim.decay_fraction",
    ),
    (
        "optim.schedule other than constant",
        lambda c: schedule_reads(c["optim.schedule"], "min_lr"),
        "optim.min_lr",
    ),
    ("checkpoint.every > 0", lambda c: c["checkpoint.every"] > 0, "checkpoint.asynchronous"),
    ("checkpoint.load", lambda c: c["checkpoint.load"] is not None, "checkpoint.load_except"),
    ("eval.every > 0", lambda c: c["eval.every"] > 0, "eval.batches"),
    (
        "eval_tasks.tasks",
        lambda c: bool(c["eval_tasks.tasks"]),
        "eval_tasks.every eval_tasks.num_fewshot eval_tasks.limit eval_tasks.apply_chat_template "
        "eval_tasks.include_path eval_tasks.batch_size",
    ),
    ("eval.sample_tokens > 0", lambda c: c["eval.sample_tokens"] > 0, "eval.sample_prompt"),
    ("data=text, megatron, chat or preference", lambda c: takes_files(c["data.kind"]), "data.files"),
    ("data other than stdlib", lambda c: c["data.kind"] != "stdlib", "data.valid_files"),
    ("data=blend", lambda c: c["data.kind"] == "blend", "data.blend data.temperature data.stages"),
    (
        "data=blend and data.valid_files=[]",
        lambda c: c["data.kind"] == "blend" and not c["data.valid_files"],
        "eval.by_part",
    ),
    (
        "data=text or data=blend",
        lambda c: (
            c["data.kind"] == "blend"
            or (c["data.kind"] != "chat" and takes_files(c["data.kind"]) and yields_documents(c["data.kind"]))
        ),
        "data.text_key",
    ),
    ("data.valid_files=[]", lambda c: not c["data.valid_files"], "data.valid_fraction"),
    (
        "data.tokenizer=null and data other than megatron",
        lambda c: c["data.tokenizer"] is None and yields_documents(c["data.kind"]),
        "data.tokenizer_sample_mib",
    ),
]
