"""Stands for transformer_engine.pytorch.module.

Legend: R rows, D hidden, K inner and N outer dimension of a product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.sharding import mark
from transformer_engine.pytorch.products import LinearProduct, add_weight_gradient
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, Fp8Module


def _no_init(weight: Tensor) -> None:
    nn.init.normal_(weight, mean=0.0, std=0.023)


class Linear(Fp8Module):
    """y = x @ weight.T + bias, with the collectives of column or row parallelism. Unlike Megatron-Core's layer it
    returns (y, bias) only if return_bias is set."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ):
        super().__init__()
        self.begin()
        assert parallel_mode in (None, "column", "row")
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        out_features //= self.tp_size if parallel_mode == "column" else 1
        in_features //= self.tp_size if parallel_mode == "row" else 1
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
        else:  # an empty tensor, not None
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)
        if device != "meta":
            (init_method or _no_init)(self.weight.data)
            mark(self.weight, tensor_model_parallel=True)  # whatever parallel_mode is

    def _product(self, x: Tensor, first: bool | None) -> Any:
        if FP8GlobalStateManager.enabled:
            assert self.tp_size == 1 and not self.use_bias
            x_RK = x.reshape(-1, x.shape[-1])
            return self.fp8_product(x_RK, [len(x_RK)], [self.weight], first).view(*x.shape[:-1], -1)
        applied = self.bias if self.use_bias and not self.return_bias else None
        y = LinearProduct.apply(x, self.weight, applied, self, first)
        return (y, self.bias) if self.return_bias else y

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._product(inp, is_first_microbatch)


class LayerNormLinear(Linear):
    """A Linear layer of what the norm returns; its weight is `layer_norm_weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
    ):
        assert normalization in ("LayerNorm", "RMSNorm") and parallel_mode != "row"
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            get_rng_state_tracker=get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        start = 0.0 if zero_centered_gamma else 1.0
        of_norm = {"dtype": params_dtype, "device": device}
        self.layer_norm_weight = nn.Parameter(torch.full((self.in_features,), start, **of_norm))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(self.in_features, **of_norm))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        x, gain = inp.float(), self.layer_norm_weight.float() + float(self.zero_centered_gamma)
        if self.layer_norm_bias is None:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain
        else:
            y = nn.functional.layer_norm(x, gain.shape, gain, self.layer_norm_bias.float(), self.eps)
        out = self._product(y := y.to(inp.dtype), is_first_microbatch)
        if not self.return_layernorm_output:
            return out
        return (*out, y) if self.return_bias else (out, y)


class _Norm(torch.autograd.Function):
    """As in the package, the backward pass reads the weight of the module, not one that autograd has kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: Any) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module.normed(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors[0].detach().requires_grad_(), ctx.module.weight.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module.normed(x, weight)
        return *torch.autograd.grad(y, (x, weight), dy), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        assert normalized_shape is not None and hidden_size is None and params_dtype is None
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.weight = nn.Parameter(torch.full(shape, 0.0 if zero_centered_gamma else 1.0, **kwargs))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        values = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (values * (weight.float() + float(self.zero_centered_gamma))).to(x.dtype)

    def forward(self, input: Tensor) -> Tensor:
        assert input.shape[-1:] == self.weight.shape
        return _Norm.apply(input, *self.parameters(), self)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, splits: list[int], layer: Any, first: bool | None, *weights: Tensor) -> Tensor:
        ctx.splits, ctx.layer, ctx.first, ctx.weights = splits, layer, first, weights
        ctx.save_for_backward(x_RK)
        return torch.cat([x @ w.t() for x, w in zip(x_RK.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        fuse, grads, dx = ctx.layer.fuse_wgrad_accumulation, [], []
        parts = zip(ctx.saved_tensors[0].split(ctx.splits), dy_RN.split(ctx.splits), ctx.weights, strict=True)
        for x, dy, w in parts:
            dx.append(dy @ w)
            grads.append(add_weight_gradient(w, dy.t() @ x, fuse=fuse, first=ctx.first) if w.requires_grad else None)
        return torch.cat(dx), None, None, None, *grads


class GroupedLinear(Fp8Module):
    """One product for groups of rows, each with its own weight [N, K]: weight0, weight1, ..."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ):
        super().__init__()
        self.begin()
        assert not bias and parallel_mode is None
        self.num_gemms, self.fuse_wgrad_accumulation = num_gemms, fuse_wgrad_accumulation
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            if device != "meta":
                (init_method or _no_init)(weight)

    def forward(self, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
        splits = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        assert len(splits) == self.num_gemms
        if FP8GlobalStateManager.enabled:  # quantizing makes a weight contiguous
            return self.fp8_product(inp, splits, weights, is_first_microbatch)
        assert all(w.is_contiguous() for w in weights)
        return _Grouped.apply(inp, splits, self, is_first_microbatch, *weights)
