"""Megatron-Core's TransformerConfig for a model: read by the tensor-parallel layers and by the engine's schedules."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import ModelConfig
from parallel.process_groups import Runtime


def transformer_config(
    model: ModelConfig,
    runtime: Runtime,
    dtype: torch.dtype,
    *,
    deterministic: bool,
    fuse_weight_gradient: bool = False,
) -> TransformerConfig:
    """The configuration of a model under a layout.

    Args:
        runtime: its layout and backend.
        dtype: of parameters and of the tensors between pipeline stages.
        deterministic: select deterministic algorithms.
        fuse_weight_gradient: as ops.weight_gradient; for training, since it needs gradient buckets.
    """
    layout = runtime.layout
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        # A norm weight that all heads share has on each tensor-parallel rank the gradient of that rank's heads only:
        # Megatron-Core then sums it, with or without sequence parallelism. A norm over the full width is sharded as
        # the heads are.
        qk_layernorm=model.qk_norm == "head",
        ffn_hidden_size=model.ffn_hidden_size,
        num_moe_experts=model.moe.num_experts or None,
        moe_ffn_hidden_size=model.expert_width if model.moe.num_experts else None,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=deterministic,
        perform_initialization=False,  # models.init initializes weights independently of the layout
        add_bias_linear=False,
        gradient_accumulation_fusion=fuse_weight_gradient,
        # Under the interleaved schedule, point-to-point communication overlaps with the next chunk. Otherwise NCCL
        # needs batched point-to-point operations to avoid deadlocks between neighbors, which gloo does not have.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=runtime.backend == "nccl" and layout.vpp == 1,
        batch_p2p_sync=False,  # device synchronization after every exchange, for PyTorch < 1.12
        # Frees a stage's output after it was sent, by replacing `.data`. With overlapped communication the send may
        # still be reading it: neither gloo's nor NCCL's work handle keeps the storage alive.
        deallocate_pipeline_outputs=layout.vpp == 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
