"""The feed-forward layer of a dense block, and of the shared experts.

Legend: S sequence (this rank's slice), B batch, D hidden, F feed-forward hidden (this rank's slice).
"""

from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.schema import ModelConfig
from ops.activations import activate
from parallel.activation_checkpoint import MATMUL_OPS, checkpointed
from parallel.process_groups import Groups
from parallel.sharding import Matrices, mark, set_sharding
from parallel.tensor_parallel import linear_options


class MLP(nn.Module):
    """The feed-forward layer of a dense block, F sharded over tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Groups, *, width: int | None = None):
        """width: F; None: model.ffn_hidden_size."""
        super().__init__()
        self.activation, width = model.activation_name, width or model.ffn_hidden_size
        self.recompute = "activation" in model.recompute
        linear, bias = linear_options(config, groups.tp), model.ffn_bias  # it is added here, whatever multiplies
        # Gate and up are separate layers, so that a tensor-parallel slice of each is a slice of the whole.
        self.up = tp.ColumnParallelLinear(model.hidden_size, width, gather_output=False, bias=bias, **linear)
        self.gate = None
        if input_projections(model.activation) == 2:
            self.gate = tp.ColumnParallelLinear(model.hidden_size, width, gather_output=False, bias=bias, **linear)
        self.down = tp.RowParallelLinear(width, model.hidden_size, input_is_parallel=True, bias=bias, **linear)
        for layer in filter(None, (self.up, self.gate)):
            std = (model.init_scale / model.hidden_size) ** 0.5
            set_sharding(layer.weight, (0, groups.tp), std=std, matrices=Matrices())
        std = (model.init_scale / width) ** 0.5
        set_sharding(self.down.weight, (1, groups.tp), std=std, matrices=Matrices())
        if model.ffn_bias:
            for layer in filter(None, (self.up, self.gate)):
                set_sharding(layer.bias, (0, groups.tp), std=0.0)
            set_sharding(self.down.bias, replicas=(groups.tp,), std=0.0)
            # As for the norms: summed over the tensor-parallel group when its ranks see different tokens.
            mark(self.down.bias, sequence_parallel=config.sequence_parallel)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return checkpointed(self._run, x_SBD, save_ops=MATMUL_OPS) if self.recompute else self._run(x_SBD)

    def _run(self, x_SBD: Tensor) -> Tensor:
        parts = [_with_bias(*layer(x_SBD)) for layer in (self.gate, self.up) if layer is not None]
        return _with_bias(*self.down(activate(parts, self.activation)))


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
