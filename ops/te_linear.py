"""TransformerEngine's linear layers, sharded over the tensor-parallel ranks, alone and after a norm.

They are built directly, not by Megatron-Core's extension classes: these decide when they are imported whether the
package is there, and read global state, while here an implementation is loaded, tried and left out like any other. What
the extension classes pass to the layers is passed here too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ops.linear import LinearSpec
from ops.norm_linear import NormParameters
from parallel.sharding import mark


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

    def _made(self, layer: type[Any], mode: str | None, spec: LinearSpec, **further: Any) -> Any:
        """mode: column, row, or None for a layer that is not sharded."""
        inner, outer, bias, config, group = spec
        return layer(
            inner,
            outer,
            parallel_mode=mode,
            sequence_parallel=config.sequence_parallel and mode is not None,
            fuse_wgrad_accumulation=self.fuse,
            tp_group=None if mode is None else group,
            tp_size=1 if mode is None else group.size(),
            init_method=_keep,
            bias=bias,
            return_bias=bias,
            params_dtype=config.params_dtype,
            device=torch.cuda.current_device(),
            **further,
        )

    def column(self, spec: LinearSpec, weight: nn.Parameter | None = None) -> Any:
        layer = self._made(self._linear, "column", spec)
        if weight is not None:
            layer.weight = weight
        return layer

    def row(self, spec: LinearSpec) -> Any:
        return self._made(self._linear, "row", spec)

    def replicated(self, spec: LinearSpec) -> Any:
        layer = self._made(self._linear, None, spec)
        mark(layer.weight, tensor_model_parallel=False)  # which is True of all that it makes
        return layer

    def norm_column(self, norm: NormParameters, spec: LinearSpec, *, returns_norm: bool = False) -> Any:
        """ops.norm_linear.NormLinear."""
        bias_D = getattr(norm, "bias", None)
        layer = self._made(
            self._norm_linear,
            "column",
            spec,
            eps=norm.eps,
            normalization="RMSNorm" if bias_D is None else "LayerNorm",
            zero_centered_gamma=norm.zero_centered,
            return_layernorm_output=returns_norm,
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
