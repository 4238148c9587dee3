"""What each setting by itself must satisfy, as tables: its choices, its bounds, and what it needs to have an effect."""

import math
from collections.abc import Callable
from typing import Any

from conf.extensions import schedule_reads, takes_files, yields_documents
from conf.schema import (
    ACTIVATIONS,
    AUX_LOSS_COUNTS,
    BACKENDS,
    CAPACITY_PER,
    DATA_KINDS,
    DISPATCHERS,
    DROP_POLICIES,
    FP8_KERNELS,
    FP8_RECIPES,
    FP8_WEIGHT_GRADIENTS,
    GROUP_SCORES,
    LOAD_BALANCING,
    OPTIM_DTYPES,
    PRECISIONS,
    QK_NORMS,
    SCHEDULES,
    SCORE_FUNCTIONS,
    SOFTMAX_ORDERS,
)

CHOICES = {
    "precision": PRECISIONS,
    "fp8.kernels": FP8_KERNELS,
    "fp8.recipe": FP8_RECIPES,
    "fp8.weight_gradient": FP8_WEIGHT_GRADIENTS,
    "model.activation": ACTIVATIONS,
    "model.qk_norm": QK_NORMS,
    "model.moe.backend": BACKENDS,
    "model.moe.dispatcher": DISPATCHERS,
    "model.moe.drop_policy": DROP_POLICIES,
    "model.moe.group_score": GROUP_SCORES,
    "model.moe.load_balancing": LOAD_BALANCING,
    "model.moe.score_function": SCORE_FUNCTIONS,
    "model.moe.softmax_order": SOFTMAX_ORDERS,
    "model.moe.aux_loss_counts": AUX_LOSS_COUNTS,
    "model.moe.capacity_per": CAPACITY_PER,
    "data.kind": DATA_KINDS,
    "optim.schedule": SCHEDULES,
    "optim.grad_dtype": OPTIM_DTYPES,
    "optim.state_dtype": OPTIM_DTYPES,
    "checkpoint.resume": (True, False, "fresh"),
}
MEANT = {
    ("precision", "fp16"): ("bf16", "is not available"),
    ("model.moe.backend", "triton_fp8"): (
        "auto",
        "is asked for by precision=fp8 fp8.kernels=triton, and fp8.linear_layers=false for the experts alone",
    ),
}
"""Choices that other trainers have: what comes nearest, where another is spelt more like it, and what to say."""


def _copies_differ_over(case: Any) -> int:
    """Ranks of a stage that hold different parts of the parameters that are cut least."""
    experts = case["parallel.etp"] * case["parallel.ep"] if case["model.moe.num_experts"] else math.inf
    return min(case["parallel.tp"], experts)


BOUNDS: list[tuple[str, Callable[[Any], bool], Any, str]] = [
    # what must hold of a value, as text and as code; the nearest value, None for the default; the settings
    (
        ">= 1",
        lambda x: x >= 1,
        1,
        "model.num_layers model.hidden_size model.num_attention_heads model.num_query_groups model.ffn_hidden_size "
        "model.head_dim model.vocab_size model.moe.every model.moe.top_k model.moe.num_expert_groups "
        "model.moe.top_k_groups model.moe.expert_chunk_rows "
        "model.moe.ffn_hidden_size model.moe.shared_ffn_hidden_size "
        "parallel.tp parallel.pp parallel.cp parallel.ep parallel.etp data.tokenizer_sample_mib train.steps "
        "train.micro_batch_size train.global_batch_size train.sequence_length train.stop_after train.log_every "
        "eval.batches eval.final_batches checkpoint.keep runtime.threads cluster.ranks_per_node cluster.cpus_per_rank "
        "world_size",
    ),
    (
        ">= 0",
        lambda x: 0 <= x < math.inf,
        0,
        "model.moe.num_experts model.moe.first_dense_layers model.moe.num_shared_experts "
        "model.moe.aux_loss_coeff model.moe.bias_update_rate "
        "model.moe.z_loss_coeff train.seed fp8.first_layers_high fp8.last_layers_high "
        "optim.min_lr optim.warmup_steps optim.weight_decay optim.clip_grad eval.every eval.sample_tokens "
        "checkpoint.every guard.max_skipped slurm.max_requeues",
    ),
    (
        "> 0",
        lambda x: 0 < x < math.inf,
        None,
        "model.rope_theta model.norm_eps model.init_scale model.moe.capacity_factor model.moe.eval_capacity_factor "
        "model.clip_qkv model.moe.routed_scaling_factor optim.lr optim.eps runtime.timeout cluster.memory_gb "
        "cluster.link_gb_per_s cluster.network_gb_per_s",
    ),
    (
        ">= 0 and < 1",
        lambda x: 0 <= x < 1,
        None,
        "optim.beta1 optim.beta2 model.moe.expert_dropout model.moe.jitter",
    ),
    ("> 0 and < 1", lambda x: 0 < x < 1, None, "data.valid_fraction"),
    ("> 0 and <= 1", lambda x: 0 < x <= 1, None, "optim.decay_fraction"),
    (">= 2", lambda x: x >= 2, 2, "parallel.vpp"),
]

IDLE: list[tuple[str, Callable[[Any], bool], str]] = [
    # when the settings on the right have an effect, as text and as code
    ("parallel.tp > 1", lambda c: c["parallel.tp"] > 1, "parallel.sequence_parallel"),
    ("parallel.pp > 1", lambda c: c["parallel.pp"] > 1, "parallel.vpp parallel.pp_layers"),
    (
        "data parallelism",
        lambda c: c["world_size"] > c["parallel.pp"] * _copies_differ_over(c),
        "parallel.overlap_grad_reduce parallel.overlap_param_gather",
    ),
    (
        "model.moe.num_experts > 0",
        lambda c: c["model.moe.num_experts"] > 0,
        # `every` is not here: num_experts=0 alone makes the dense twin of a sparse preset
        "parallel.ep parallel.etp model.moe.top_k model.moe.score_function model.moe.softmax_order "
        "model.moe.renormalize model.moe.routed_scaling_factor model.moe.num_expert_groups model.moe.capacity_factor "
        "model.moe.eval_capacity_factor model.moe.aux_loss_coeff model.moe.load_balancing model.moe.z_loss_coeff "
        "model.moe.bias_update_rate model.moe.jitter model.moe.backend model.moe.expert_bias "
        "model.moe.num_shared_experts model.moe.expert_dropout model.moe.expert_chunk_rows "
        "model.moe.ffn_hidden_size model.moe.first_dense_layers",
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
    ("parallel.ep > 1", lambda c: c["parallel.ep"] > 1, "model.moe.dispatcher"),
    (
        "a model.moe.load_balancing by a loss (aux_loss, seq_aux_loss, global_aux_loss)",
        lambda c: c["model.moe.load_balancing"] not in ("sinkhorn", "expert_choice"),
        "model.moe.aux_loss_coeff model.moe.bias_update_rate model.moe.num_expert_groups",
    ),
    (
        "another model.moe.load_balancing than expert_choice",
        lambda c: c["model.moe.load_balancing"] != "expert_choice",
        "model.moe.softmax_order model.moe.renormalize model.moe.drop_policy model.moe.eval_capacity_factor",
    ),
    (
        "model.moe.num_expert_groups > 1",
        lambda c: c["model.moe.num_expert_groups"] > 1,
        "model.moe.top_k_groups model.moe.group_score",
    ),
    (
        "a model.moe.load_balancing by a loss, with a bias_update_rate or num_expert_groups > 1",
        lambda c: (
            c["model.moe.load_balancing"] in ("aux_loss", "seq_aux_loss", "global_aux_loss")
            and (c["model.moe.bias_update_rate"] is not None or c["model.moe.num_expert_groups"] > 1)
        ),
        "model.moe.aux_loss_counts",
    ),
    (
        "a model.moe.load_balancing other than expert_choice, and a capacity factor",
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
        "a layer in bf16 (precision, fp8.first_layers_high)",
        lambda c: c["precision"] != "fp8" or c["fp8.first_layers_high"] + c["fp8.last_layers_high"] > 0,
        "model.moe.backend",
    ),
    ("parameters in bf16 (precision)", lambda c: c["precision"] != "fp32", "optim.grad_dtype"),
    (
        "optim.schedule=wsd",
        lambda c: schedule_reads(c["optim.schedule"], "decay_fraction"),
        "optim.decay_fraction",
    ),
    (
        "another optim.schedule than constant",
        lambda c: schedule_reads(c["optim.schedule"], "min_lr"),
        "optim.min_lr",
    ),
    ("checkpoint.every > 0", lambda c: c["checkpoint.every"] > 0, "checkpoint.asynchronous"),
    ("checkpoint.load", lambda c: c["checkpoint.load"] is not None, "checkpoint.load_except"),
    ("eval.every > 0", lambda c: c["eval.every"] > 0, "eval.batches"),
    ("eval.sample_tokens > 0", lambda c: c["eval.sample_tokens"] > 0, "eval.sample_prompt"),
    ("data=text or data=megatron", lambda c: takes_files(c["data.kind"]), "data.files"),
    ("other data than stdlib", lambda c: c["data.kind"] != "stdlib", "data.valid_files"),
    ("data=blend", lambda c: c["data.kind"] == "blend", "data.blend"),
    (
        "data=text or data=blend",
        lambda c: c["data.kind"] == "blend" or (takes_files(c["data.kind"]) and yields_documents(c["data.kind"])),
        "data.text_key",
    ),
    ("data.valid_files=[]", lambda c: not c["data.valid_files"], "data.valid_fraction"),
    (
        "data.tokenizer=null and data other than megatron",
        lambda c: c["data.tokenizer"] is None and yields_documents(c["data.kind"]),
        "data.tokenizer_sample_mib",
    ),
]
