"""What precision=fp8 replaces in the model, and with which kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from conf.fp8_rules import fp8_layers
from conf.schema import Fp8Config, ModelConfig
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference, Tools
from ops.grouped_mlp import experts_with, linear_with
from ops.permute import Origin
from ops.registry import largest_difference

BF16_CAPABILITY, CAPABILITY = (8, 0), (8, 9)
"""The first generations of GPUs with tensor cores for bf16 and for FP8."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""The largest relative difference, by norm, that rounding explains (fp32: TF32 is off by default)."""

Backend = Callable[..., torch.Tensor]
"""Of moe.experts.BACKENDS, or ops.grouped_mlp.linear_with."""


@dataclass(frozen=True)
class Float8:
    experts: Tools
    linear: Tools | None
    """For the linear layers of attention, dense and shared feed-forward layers; None: they stay in bf16."""
    layers: range
    """The layers in FP8, counted from 0 over the whole model."""


def choose_float8(fp8: Fp8Config, model: ModelConfig, device: torch.device) -> tuple[Float8, str, str]:
    """(what runs, its name, why) for precision=fp8.

    Raises:
        ValueError: the kernels that were asked for cannot run here.
    """
    (experts, linear), name, why = _choose_tools(fp8, device)
    layers = fp8_layers(fp8.first_layers_high, fp8.last_layers_high, model.num_layers)
    gradient = "" if fp8.weight_gradient == "fp8" else ", weight gradients in bf16"
    which = "every layer" if len(layers) == model.num_layers else f"layers {layers[0]} to {layers[-1]}"
    if not fp8.linear_layers:
        linear, which = None, f"the experts of {which}"
    return Float8(experts, linear, layers), f"{name}, {fp8.recipe}{gradient}", f"{which}; {why}"


def _choose_tools(fp8: Fp8Config, device: torch.device) -> tuple[tuple[Tools, Tools], str, str]:
    """((of experts, of linear layers), their name, why)."""
    recipe, narrow = RECIPES[fp8.recipe], fp8.weight_gradient == "fp8"
    if fp8.kernels == "reference" or (fp8.kernels == "auto" and device.type == "cpu"):
        why = "asked for" if fp8.kernels == "reference" else "a CPU has no FP8 products"
        tools = Reference(recipe, narrow_weight_gradient=narrow)
        return (tools, tools), "emulated by rounding operands", why
    missing = triton_obstacle(device, CAPABILITY)
    if missing:
        raise ValueError(f"precision=fp8 {missing}. Use precision=bf16, or fp8.kernels=reference to emulate FP8")
    from ops.triton.gemm_backend import Float8Tools
    from ops.triton.scaled_mm import ScaledTools

    kinds = (Float8Tools, ScaledTools, Reference)
    triton, scaled, reference = (kind(recipe, narrow_weight_gradient=narrow) for kind in kinds)
    wrong = disagreement(experts_with(triton), experts_with(reference), device, run=routed_experts)
    if wrong:
        raise ValueError(f"precision=fp8: Triton's kernels {wrong}. Use precision=bf16, or fp8.kernels=reference")
    why = "the GPU has FP8 products, and they equal the reference's on a random batch"
    if fp8.kernels == "triton" or not fp8.linear_layers:
        return (triton, triton), "Triton", why if fp8.kernels == "auto" else f"asked for; {why}"
    wrong = disagreement(linear_with(scaled), linear_with(reference), device, run=_linear)
    if wrong:
        return (triton, triton), "experts and linear layers on Triton", f"{why}; torch's scaled_mm: {wrong}"
    return (triton, scaled), "experts on Triton, linear layers on torch's scaled_mm", why


def triton_obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    """What Triton's kernels lack here; None: nothing. On a CPU they run in Triton's interpreter alone, thousands of
    times slower, which tests do by themselves."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a GPU, and this run is on a CPU"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        needed, has = (".".join(map(str, c)) for c in (capability, found))
        return f"needs a GPU of compute capability {needed}; this one has {has}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs the package triton, which does not import ({error}): bash launch/setup.sh kernels"
    return None


Trial = Callable[[Backend, torch.device, torch.dtype], list[torch.Tensor]]
"""(implementation, device, dtype) -> an output and all gradients on a random batch."""


def _random(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*s, generator=generator).to(device, dtype) / 8 for s in shapes]
    return [t.requires_grad_() for t in made]


def _experts(
    backend: Backend, device: torch.device, dtype: torch.dtype, origin: Origin | None = None
) -> list[torch.Tensor]:
    """Of which one has no row and one a single one."""
    tokens = 150 if origin is None else 100
    *leaves, grad_RD = _random(((tokens, 256), (4, 256, 2, 128), (4, 128, 256), (150, 256)), device, dtype)
    more = [] if origin is None else [None, None, origin]
    y_RD = backend(leaves[0], [70, 0, 1, 79], *leaves[1:], "swiglu", *more)
    return [y_RD.detach(), *torch.autograd.grad(y_RD, leaves, grad_RD)]


def routed_experts(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same on rows that lie elsewhere: of 100 tokens with two choices each, 50 choices dropped."""
    choice_R = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150].to(device)
    return _experts(backend, device, dtype, Origin(choice_R, 2))


def _linear(layer: Backend, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows and blocks that are no multiples of four, where layouts of scales begin to differ."""
    *leaves, grad_RN = _random(((150, 384), (256, 384), (150, 256)), device, dtype)
    y_RN = layer(*leaves)
    return [y_RN.detach(), *torch.autograd.grad(y_RN, leaves, grad_RN)]


def disagreement(
    backend: Backend,
    reference: Backend,
    device: torch.device,
    run: Trial = _experts,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """How a backend of the experts, or with run=_linear a linear layer, differs from the reference on a random batch.
    None: by no more than rounding explains."""
    try:
        difference = largest_difference(run(backend, device, dtype), run(reference, device, dtype))
    except Exception as error:
        return f"failed their trial ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''})"
    return f"differ from the reference by {difference:.0e}" if difference > TOLERANCE[dtype] else None
