"""The configuration of Megatron-Core in the benchmarks."""

from typing import Any

import torch

from conf.schema import ModelConfig


def megatron_config(model: ModelConfig) -> Any:
    """Megatron-Core's configuration of a model in bf16, with the features that need neither CUDA nor other packages."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_moe_experts=model.moe.num_experts,
        ffn_hidden_size=model.ffn_hidden_size,
        moe_ffn_hidden_size=model.ffn_hidden_size,
        moe_router_topk=model.moe.top_k,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_force_load_balancing=model.moe.force_balance,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=model.moe.aux_loss_coeff,
        moe_z_loss_coeff=model.moe.z_loss_coeff,
        moe_token_dispatcher_type="allgather",  # alltoall waits for a CUDA event; on one rank both only sort
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        # Extensions of Apex and fusions of TransformerEngine or CUDA.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
