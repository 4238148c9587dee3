"""TransformerEngine's linear layers, sharded over the tensor-parallel ranks, alone and after a norm.

They are built directly, not by Megatron-Core's extension classes: these decide when they are imported whether the
package is there, and read global state, while here an implementation is loaded, tried and left out like any other. What
the extension classes pass to the layers is passed here too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.norm_linear import NormParameters


def _keep(weight: Tensor) -> None:
    """In place of the layers' init_method: models.init sets the weights."""


class TeLayers:
    """ops.linear.LinearLayers."""

    has_matmul_ops = False

    def __init__(self, *, fuse: bool):
        """fuse: the gradient of a weight is added to its main gradient by the product itself."""
        from transformer_engine.pytorch import (  # pyright: ignore[reportMissingImports]
            LayerNormLinear,
            Linear,
        )

        self.fuse = fuse
        self._linear, self._norm_linear = _beside_its_bias(Linear), _beside_its_bias(LayerNormLinear)

    def _options(self, bias: bool, config: Any, group: dist.ProcessGroup) -> dict[str, Any]:
        return {
            "sequence_parallel": config.sequence_parallel,
            "fuse_wgrad_accumulation": self.fuse,
            "tp_group": group,
            "tp_size": group.size(),
            "init_method": _keep,
            "bias": bias,
            "return_bias": bias,
            "params_dtype": config.params_dtype,
            "device": torch.cuda.current_device(),
        }

    def column(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        return self._linear(inner, outer, parallel_mode="column", **self._options(bias, config, group))

    def row(self, inner: int, outer: int, bias: bool, config: Any, group: dist.ProcessGroup) -> Any:
        return self._linear(inner, outer, parallel_mode="row", **self._options(bias, config, group))

    def norm_column(
        self,
        norm: NormParameters,
        inner: int,
        outer: int,
        bias: bool,
        config: Any,
        group: dist.ProcessGroup,
        *,
        returns_norm: bool = False,
    ) -> Any:
        """ops.norm_linear.NormLinear."""
        bias_D = getattr(norm, "bias", None)
        layer = self._norm_linear(
            inner,
            outer,
            parallel_mode="column",
            eps=norm.eps,
            normalization="RMSNorm" if bias_D is None else "LayerNorm",
            zero_centered_gamma=norm.zero_centered,
            return_layernorm_output=returns_norm,
            **self._options(bias, config, group),
        )
        layer.layer_norm_weight = norm.weight
        if bias_D is not None:
            layer.layer_norm_bias = bias_D
        return layer


def _beside_its_bias(layer: type[Any]) -> type[Any]:
    """The class of a layer, which returns (output, bias or None), as Megatron-Core's do, and after these the norm's
    output if it was asked for. Without is_first_microbatch every gradient is added to the main gradient, which is zero
    before the first."""

    class Layer(layer):
        def forward(self, x: Tensor) -> Any:
            returned = super().forward(x)
            y, *further = returned if isinstance(returned, tuple) else (returned,)
            bias = further.pop(0) if self.return_bias else None
            return y, bias, *further

    Layer.__name__ = Layer.__qualname__ = layer.__name__
    return Layer
