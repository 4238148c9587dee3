"""The experts' layer as an operation: act(x @ w_in + b_in) @ w_out of each row's expert.

Legend: R routed rows grouped by expert, D hidden, F expert hidden (this rank's slice), L experts of this rank,
G 2 for gated activations, else 1, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.extensions import input_projections
from ops import autotune, te
from ops.activations import IN_KERNELS, activate
from ops.adapted_experts import Adapted, Product, frozen_product
from ops.fused_experts import COMPILED_PER_SHAPE, FusedExperts
from ops.gemm_backend import GemmBackend, Reference
from ops.gpu import BF16_CAPABILITY, triton_unsupported_reason
from ops.grouped_mlp import experts_with
from ops.operation import Implementation, Operation
from ops.permute import PermuteIndices
from ops.run_context import RunContext

ONE_AFTER_THE_OTHER = Adapted()


@dataclass(frozen=True)
class ExpertBackend:
    """How the products of the experts run."""

    run: Callable[..., Tensor]
    """loop_experts' arguments, loop_experts' result."""
    permutes: bool = False
    """Takes, after these arguments, the PermuteIndices of the rows, and then tokens instead of rows."""
    recomputes_activation: bool = False
    """Computes the activation again in the backward pass anyway."""
    adapted: Adapted = ONE_AFTER_THE_OTHER
    """What runs instead where the experts have adapters, which add to each product."""

    @classmethod
    def on(cls, gemm: GemmBackend) -> "ExpertBackend":
        return cls(
            experts_with(gemm), permutes=True, recomputes_activation=True, adapted=Adapted(frozen_product(gemm), True)
        )


def loop_experts(
    x_RD: Tensor,
    counts: Sequence[int],
    w_in_LDGF: Tensor,
    w_out_LFD: Tensor,
    activation: str,
    b_in_LGF: Tensor | None = None,
    keep_RF: Tensor | None = None,
) -> Tensor:
    """One product per expert: the reference.

    Args:
        b_in_LGF: added to the hidden width before the activation.
        keep_RF: what the activation is multiplied by (dropout): 0, or 1 over the share that is kept.
    """
    counts = list(counts)
    # unbind, not indexing: the gradient of w[e] would be a zero tensor of the size of all experts, once per expert.
    biases = [None] * len(counts) if b_in_LGF is None else b_in_LGF.unbind(0)
    keeps = _split_or_none(keep_RF, counts)
    parts = (x_RD.split(counts), w_in_LDGF.unbind(0), w_out_LFD.unbind(0), biases, keeps)
    out = []
    for x, w_in_DGF, w_out_FD, b_in_GF, keep in zip(*parts, strict=True):
        h = (x @ w_in_DGF.flatten(1)).unflatten(-1, w_in_DGF.shape[1:])
        h = h if b_in_GF is None else h + b_in_GF
        act = activate(h.unbind(-2), activation)
        out.append((act if keep is None else act * keep) @ w_out_FD)
    return torch.cat(out)


LOOP = ExpertBackend(loop_experts)


def _split_or_none(t_RX: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if t_RX is None else t_RX.split(counts)


def experts_by(
    product: Product,
    x_RD: Tensor,
    counts: Sequence[int],
    w_in_LDGF: Tensor,
    w_out_LFD: Tensor,
    activation: str,
    b_in_LGF: Tensor | None = None,
    keep_RF: Tensor | None = None,
) -> Tensor:
    """loop_experts with one product for all experts."""
    if not x_RD.shape[0]:
        # A grouped product needs a row.
        return loop_experts(x_RD, counts, w_in_LDGF, w_out_LFD, activation, b_in_LGF, keep_RF)
    h = product(x_RD, w_in_LDGF.flatten(2), counts).unflatten(-1, w_in_LDGF.shape[2:])
    h = h if b_in_LGF is None else h + of_rows(b_in_LGF, counts)
    act = activate(h.unbind(-2), activation)
    return product(act if keep_RF is None else act * keep_RF, w_out_LFD, counts)


def torch_grouped_product(x_RK: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """A Product in one launch."""
    return F.grouped_mm(x_RK, w.flatten(2), offs=_on_device(list(accumulate(counts)), x_RK.device))


grouped_experts = partial(experts_by, torch_grouped_product)

FEW_ROWS = {False: 2048, True: 256}
"""Of which a forward pass takes longer for the host's part than for the products, in text generation; fewer where a
library compiles a kernel for every number of rows (ops.fused_experts)."""


def fused_experts(
    x_RD: Tensor,
    counts: Sequence[int],
    w_in_LDGF: Tensor,
    w_out_LFD: Tensor,
    activation: str,
    b_in_LGF: Tensor | None = None,
    keep_RF: Tensor | None = None,
) -> Tensor:
    """loop_experts by FusedExperts; without a gradient, few rows by as few operations as there can be."""
    if torch.is_grad_enabled() or len(x_RD) > FEW_ROWS[x_RD.dtype in COMPILED_PER_SHAPE]:
        return FusedExperts.apply(x_RD, counts, w_in_LDGF, w_out_LFD, activation, b_in_LGF, keep_RF)
    product = torch_grouped_product if _many_are_busy(x_RD, counts, w_in_LDGF, w_out_LFD) else _few_rows
    h_RGF = product(x_RD, w_in_LDGF.flatten(2), counts).view(len(x_RD), *w_in_LDGF.shape[2:])
    h_RGF = h_RGF if b_in_LGF is None else h_RGF + of_rows(b_in_LGF, counts)
    act = activate(h_RGF.unbind(1), activation)
    return product(act if keep_RF is None else act * keep_RF, w_out_LFD, counts)


def _many_are_busy(x_RD: Tensor, counts: Sequence[int], *weights: Tensor) -> bool:
    """Whether torch's grouped product takes less time than a call for each expert that has rows: on a CPU it makes a
    call for every expert, without Python between them. It needs matrices whose rows are multiples of 16 bytes."""
    aligned = all(size * x_RD.element_size() % 16 == 0 for w in weights for size in (w.shape[1], w.shape[-1]))
    return aligned and x_RD.device.type == "cpu" and 2 * sum(map(bool, counts)) > len(counts)


def _few_rows(x_RK: Tensor, w_LKN: Tensor, counts: Sequence[int]) -> Tensor:
    """A Product with a call for each expert that has rows."""
    y_RN = x_RK.new_empty((len(x_RK), w_LKN.shape[2]))
    busy = [e for e, n in enumerate(counts) if n]
    rows = [counts[e] for e in busy]
    for e, x, y in zip(busy, x_RK.split_with_sizes(rows), y_RN.split_with_sizes(rows), strict=True):
        torch.mm(x, w_LKN.select(0, e), out=y)
    return y_RN


def of_rows(per_expert: Tensor, counts: Sequence[int]) -> Tensor:
    """[L, ...] -> [R, ...]: for every row what belongs to its expert."""
    if not torch.is_grad_enabled():  # less of the host's time
        experts_R = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        return per_expert.index_select(0, experts_R.to(per_expert.device, non_blocking=True))
    repeats = _on_device(counts, per_expert.device)
    return per_expert.repeat_interleave(repeats, dim=0, output_size=sum(counts))


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int32. `torch.tensor(numbers, device=device)` would make the host wait for the device."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


def _triton(context: RunContext) -> ExpertBackend:
    """Our own grouped products, which read rows from where they lie, and whose weight gradients add to Megatron-Core's
    fp32 buffer by themselves."""
    from ops.triton.gemm_backend import TritonGemmBackend  # Triton is an optional package

    return ExpertBackend.on(TritonGemmBackend())


def _grouped_mm_fused(context: RunContext) -> ExpertBackend:
    from ops.triton.gemm_backend import GroupedMmBackend

    return ExpertBackend.on(GroupedMmBackend())


def _te(context: RunContext) -> ExpertBackend:
    from ops.te_grouped_gemm import TeGemmBackend

    return te.load(lambda: ExpertBackend.on(TeGemmBackend(_activations(context))))


def _activations(context: RunContext) -> GemmBackend:
    """Whose activations go with products that have none: Triton's, and PyTorch's for those of extensions."""
    if context.device.type == "cpu" or _no_triton_kernels(context):
        return Reference()
    from ops.triton.gemm_backend import TritonGemmBackend  # Triton is an optional package

    return TritonGemmBackend()


def _misaligned(context: RunContext) -> str | None:
    row_bytes = torch.finfo(context.dtype).bits // 8
    for size in (context.model.hidden_size, _width(context)):
        if size * row_bytes % 16:
            return (
                f"needs rows of a multiple of 16 bytes; {size} values of {context.dtype} are not: "
                "sizes divisible by 8 are"
            )
    return None


def activation_missing(context: RunContext) -> str | None:
    """Other activations, such as those of extensions, are computed by PyTorch alone."""
    name = context.model.activation
    return None if name in IN_KERNELS else f"has no activation {name}"


def _no_triton_kernels(context: RunContext) -> str | None:
    return triton_unsupported_reason(context.device, BF16_CAPABILITY) or activation_missing(context)


def _width(context: RunContext) -> int:
    """F."""
    return context.model.expert_width // context.groups.etp.size()


def _experts_in_bf16(context: RunContext) -> bool:
    """Whether a layer has experts that are not in FP8. One that was asked for is tried, used or not."""
    model = context.model
    only_training = context.config.precision == "fp8" and context.config.fp8.kernels == "te"
    return (
        only_training
        or model.moe.backend != "auto"
        or any(layer not in context.fp8_layers for layer in model.routed_layers)
    )


def _trial(backend: ExpertBackend, context: RunContext) -> list[Tensor]:
    """Four experts of the run's widths, of which one has no row and one a single one. The rows lie elsewhere: of 100
    tokens with two choices each, 50 choices are dropped."""
    model, width, counts = context.model, _width(context), [70, 0, 1, 79]
    gates = input_projections(model.activation)
    hidden, rows = model.hidden_size, sum(counts)
    x_TD, w_in = context.randn(100, hidden), context.randn(4, hidden, gates, width, seed=1) / hidden**0.5
    w_out, b_in = context.randn(4, width, hidden, seed=2) / width**0.5, context.randn(4, gates, width, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (x_TD, w_in, w_out, *([b_in] if model.moe.expert_bias else []))]
    keep_RF = (context.randn(rows, width, seed=4) > 0) * 2.0 if model.moe.expert_dropout else None
    choice_R = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:rows].to(context.device)
    indices = PermuteIndices(choice_R, 2)
    x = leaves[0] if backend.permutes else leaves[0].index_select(0, indices.token_R())
    more = (indices,) if backend.permutes else ()
    bias, keep_RF = leaves[3] if model.moe.expert_bias else None, None if keep_RF is None else keep_RF.to(x.dtype)
    main_grad = _give_main_gradient(leaves[2]) if context.train and context.config.optim.grad_dtype == "fp32" else None
    y_RD = backend.run(x, counts, leaves[1], leaves[2], model.activation_name, bias, keep_RF, *more)
    gradients = [*torch.autograd.grad(y_RD, leaves, context.randn(rows, hidden, seed=5))]
    if main_grad is not None:
        added: bool = leaves[2].grad_added_to_main_grad  # pyright: ignore[reportAttributeAccessIssue]
        gradients[2] = main_grad if added else main_grad + gradients[2]
    return [y_RD.detach(), *gradients]


def _give_main_gradient(weight: Tensor) -> Tensor:
    """What the weight of a run has: where a backend may add its gradient by itself (ops.gemm_backend.main_gradient).
    The other weight goes without, as where gradients are added up in bf16."""
    main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.main_grad, weight.grad_added_to_main_grad = main_grad, False  # pyright: ignore[reportAttributeAccessIssue]
    return main_grad


@dataclass(frozen=True)
class Shapes:
    """What one rank's experts, or a part of them whose rows travel together, compute in a micro-batch."""

    rows: int
    hidden_size: int
    width: int
    experts: int
    activation: str
    bias: bool
    dtype: str
    """As torch calls it: float32, bfloat16."""

    @classmethod
    def of(cls, context: RunContext) -> "Shapes":
        model, layout, train = context.model, context.runtime.layout, context.config.train
        tokens = train.micro_batch_size * train.sequence_length // (layout.cp * layout.tp)
        return cls(
            rows=tokens * model.moe.top_k * layout.etp // model.moe.overlap_degree,
            hidden_size=model.hidden_size,
            width=_width(context),
            experts=model.moe.num_experts // layout.ep // model.moe.overlap_degree,
            activation=model.activation_name,
            bias=model.moe.expert_bias,
            dtype=str(context.dtype).removeprefix("torch."),
        )

    def counts(self, repetition: int) -> list[int]:
        """Rows of each expert, as uneven as a trained router leaves them, shares between a half and one and a half of
        the mean, and as never before: a kernel built for one row count alone is no use at the next step."""
        share_L = torch.linspace(0.5, 1.5, self.experts) ** (1 + repetition / 16)
        ends = (share_L.cumsum(0) / share_L.sum() * self.rows).round().to(torch.int64)
        return ends.diff(prepend=ends.new_zeros(1)).tolist()

    def step(self, backend: ExpertBackend, device: torch.device) -> autotune.Step:
        """A forward and backward pass."""
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.dtype)
        gates = input_projections(self.activation)
        sizes = (
            (self.rows, self.hidden_size),
            (self.experts, self.hidden_size, gates, self.width),
            (self.experts, self.width, self.hidden_size),
            (self.experts, gates, self.width),
        )
        drawn = [torch.rand(s, generator=generator).sub_(0.5).to(device, dtype).requires_grad_() for s in sizes]
        x, w_in, w_out, b_in = drawn

        def step(repetition: int) -> None:
            bias = b_in if self.bias else None
            y = backend.run(x, self.counts(repetition), w_in, w_out, self.activation, bias, None)
            y.backward(y.detach())

        return step


def _tune(
    backends: Mapping[str, ExpertBackend], default: tuple[str, str], context: RunContext, memory: autotune.Memory
) -> tuple[str, str, bool]:
    shapes = Shapes.of(context)

    def steps() -> dict[str, autotune.Step]:
        return {name: shapes.step(backend, context.device) for name, backend in backends.items()}

    return autotune.choose(steps, list(backends), default, context, asdict(shapes), memory)


def _on_gpu_in_bf16(context: RunContext) -> bool:
    return context.device.type == "cuda" and context.dtype == torch.bfloat16


def _loop(context: RunContext) -> Implementation[ExpertBackend]:
    other = context.device.type == "cuda" and context.dtype != torch.bfloat16
    why = f"{context.dtype} on a GPU" if other else "one product per expert"
    return Implementation("loop", lambda context: LOOP, why)


EXPERTS = Operation(
    field="experts",
    name="experts",
    reference=_loop,
    implementations=[
        Implementation(
            "grouped_mm",
            lambda context: ExpertBackend(grouped_experts, adapted=Adapted(torch_grouped_product)),
            "one launch for all experts",
            unsupported_reason=_misaligned,
            is_default=_on_gpu_in_bf16,
        ),
        Implementation(
            "fused",
            lambda context: ExpertBackend(fused_experts, recomputes_activation=True),
            "one operation, which keeps less for the backward pass than loop",
            is_default=lambda context: context.device.type == "cpu",
        ),
        Implementation(
            "triton",
            _triton,
            "our grouped products",
            device="cuda",
            dtypes=(torch.bfloat16,),
            unsupported_reason=_no_triton_kernels,
            is_default=lambda context: False,
        ),
        Implementation(
            "grouped_mm_fused",
            _grouped_mm_fused,
            "torch's grouped products, our activations and weight gradients",
            device="cuda",
            dtypes=(torch.bfloat16,),
            unsupported_reason=lambda context: _misaligned(context) or _no_triton_kernels(context),
            is_default=lambda context: False,
        ),
        Implementation(
            "te",
            _te,
            "TransformerEngine's grouped product, which adds to the weight gradients",
            device="cuda",
            dtypes=(torch.bfloat16,),
            is_supported=lambda context: context.model.transformer_impl != "local",
            is_default=lambda context: False,
        ),
    ],
    trial=_trial,
    tolerance={torch.float32: 1e-4, torch.bfloat16: 1e-2},
    is_used=lambda context: bool(context.model.moe.num_experts) and _experts_in_bf16(context),
    setting="model.moe.backend",
    refusal="model.moe.backend={name} {reason}. Use model.moe.backend=auto, or model.moe.backend=loop",
    tune=_tune,
    standard="the reference",
)
