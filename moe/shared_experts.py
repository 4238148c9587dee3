"""Experts that every token visits."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import ModelConfig
from moe.mlp import MLP
from ops.linear import MEGATRON_LAYERS, LinearLayers
from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class SharedExperts(nn.Module):
    """num_shared_experts of them, as one dense layer of their widths together (DeepSeekMoE, arXiv:2401.06066, eq. 9),
    sharded over the tensor-parallel ranks as any dense layer is. With shared_expert_gate each token scales their output
    by sigmoid(x . g), as in Qwen2-MoE."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Groups,
        linear: LinearLayers = MEGATRON_LAYERS,
    ):
        super().__init__()
        self.ffn = MLP(model, config, groups, width=model.shared_width, linear=linear)
        self.gate: nn.Parameter | None = None
        if model.moe.shared_expert_gate:
            self.gate = nn.Parameter(torch.empty(1, model.hidden_size, dtype=config.params_dtype))
            set_sharding(self.gate, replicas=(groups.tp,), std=(model.init_scale / model.hidden_size) ** 0.5)
            # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
            mark(self.gate, sequence_parallel=config.sequence_parallel)

    def forward(self, x_SBD: Tensor) -> Tensor:
        y_SBD = self.ffn(x_SBD)
        return y_SBD if self.gate is None else y_SBD * nn.functional.linear(x_SBD, self.gate).sigmoid()
