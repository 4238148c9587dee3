"""The feed-forward layer of a dense block, and of the shared experts.

Legend: S sequence (this rank's slice), B batch, D hidden, F feed-forward hidden (this rank's slice).
"""

from functools import partial

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.schema import ModelConfig
from ops.activations import activate
from ops.linear import MEGATRON_LAYERS, LinearLayers, LinearSpec
from ops.norm_linear import NormLinear, NormParameters
from parallel.activation_checkpoint import MATMUL_OPS, checkpoint_without_output, checkpointed
from parallel.process_groups import Groups
from parallel.sharding import Matrices, mark, set_sharding


class MLP(nn.Module):
    """The feed-forward layer of a dense block, F sharded over tensor-parallel ranks."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: Groups,
        *,
        width: int | None = None,
        linear: LinearLayers = MEGATRON_LAYERS,
        fused: tuple[NormLinear, NormParameters] | None = None,
    ):
        """Args:
        width: F; None: model.ffn_hidden_size.
        fused: the norm of the input is computed here, with the first linear layer; None: the input is normalised.
        """
        super().__init__()
        self.activation, width = model.activation_name, width or model.ffn_hidden_size
        self.recompute = "activation" in model.recompute
        self.keeps_products, self.norm_is_fused = linear.has_matmul_ops and fused is None, fused is not None
        gated = input_projections(model.activation) == 2
        # Gate and up are separate layers, so that a tensor-parallel slice of each is a slice of the whole.
        spec = LinearSpec(model.hidden_size, width, model.ffn_bias, config, groups.tp)  # biases are added here
        first = partial(fused[0], fused[1], returns_norm=gated) if fused else linear.column
        self.up = (linear.column if gated else first)(spec)
        self.gate = first(spec) if gated else None
        self.down = linear.row(spec._replace(inner=width, outer=model.hidden_size))
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
        if self.recompute and self.keeps_products:
            return checkpointed(self._run, x_SBD, save_ops=MATMUL_OPS)
        return self._run(x_SBD)

    def _run(self, x_SBD: Tensor) -> Tensor:
        if self.norm_is_fused and self.gate is not None:
            gate, bias, x_SBD = self.gate(x_SBD)  # the second layer reads the norm's output
            parts = [_with_bias(gate, bias), _with_bias(*self.up(x_SBD))]
        else:
            parts = [_with_bias(*layer(x_SBD)) for layer in (self.gate, self.up) if layer is not None]
        if self.recompute and not self.keeps_products:
            return checkpoint_without_output(self._checkpointed_activation, parts, self._down)
        return self._down(self._activate(*parts))

    def _activate(self, *parts: Tensor) -> Tensor:
        return activate(parts, self.activation)

    def _checkpointed_activation(self, *parts: Tensor) -> Tensor:
        """What it computes on the way is not kept either."""
        return checkpointed(self._activate, *parts)

    def _down(self, act: Tensor) -> Tensor:
        return _with_bias(*self.down(act))


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
