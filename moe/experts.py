"""The feed-forward layers: one dense, or many experts.

Legend: R routed rows grouped by expert, D hidden, F expert hidden (this rank's slice), L experts of this rank,
G 2 for gated activations, else 1.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.schema import ModelConfig
from moe.chunked_experts import InPieces
from moe.expert_dropout import Dropout
from ops.activations import activate
from ops.cpp import build as native
from ops.cpp.experts import NativeTools
from ops.fp8 import BF16_CAPABILITY, disagreement, routed_experts, triton_obstacle
from ops.fused_experts import FusedExperts
from ops.gemm_backend import Reference, Tools
from ops.grouped_mlp import experts_with
from ops.permute import Routed
from ops.te_grouped_gemm import te_grouped_product
from parallel.activation_checkpoint import MATMUL_OPS, checkpointed
from parallel.process_groups import Groups
from parallel.sharding import set_sharding


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


def _split_or_none(t_RX: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if t_RX is None else t_RX.split(counts)


Product = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(x [R, K], w [L, K, N], counts) -> [R, N]: each expert's rows times its weight, R > 0."""


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


def torch_grouped_product(x_RK: Tensor, w_LKN: Tensor, counts: Sequence[int]) -> Tensor:
    """A Product in one launch."""
    return F.grouped_mm(x_RK, w_LKN, offs=_on_device(list(accumulate(counts)), x_RK.device))


grouped_experts = partial(experts_by, torch_grouped_product)
te_experts = partial(experts_by, te_grouped_product)


def of_rows(per_expert: Tensor, counts: Sequence[int]) -> Tensor:
    """[L, ...] -> [R, ...]: for every row what belongs to its expert."""
    repeats = _on_device(counts, per_expert.device)
    return per_expert.repeat_interleave(repeats, dim=0, output_size=sum(counts))


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int32. `torch.tensor(numbers, device=device)` would make the host wait for the device."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


def triton_experts(*arguments: Any) -> Tensor:
    """Our own grouped products, which read rows from where they lie, and whose weight gradients add to Megatron-Core's
    fp32 buffer by themselves."""
    return _on_triton()(*arguments)


@cache
def _on_triton() -> Callable[..., Tensor]:
    from ops.triton.gemm_backend import TritonTools  # Triton is an optional package

    return experts_with(TritonTools())


native_experts = experts_with(NativeTools())
"""What triton_experts are on a GPU, on a CPU with AVX512-BF16."""

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop_experts,
    "grouped_mm": grouped_experts,
    "fused": FusedExperts.apply,
    "native": native_experts,
    "triton": triton_experts,
    "te": te_experts,
}
"""What can run the experts' products: loop_experts' arguments, loop_experts' result."""

GATHER = ("native", "triton")
"""Those that take an Origin of the rows."""

KEEP_PRODUCTS_ONLY = ("fused", "native", "triton")
"""Those that compute the activation again in the backward pass anyway."""


def _not_for_grouped_mm(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    missing = _misaligned(model, dtype) or _grouped_mm_fails(device, dtype)
    return missing and f"{missing}. Use model.moe.backend=loop, or auto"


@cache
def _grouped_mm_fails(device: torch.device, dtype: torch.dtype) -> str | None:
    """On some GPUs an expert without rows has had wrong gradients (pytorch#172439)."""
    return disagreement(grouped_experts, loop_experts, device, dtype=dtype)


def _misaligned(model: ModelConfig, dtype: torch.dtype) -> str | None:
    row_bytes = torch.finfo(dtype).bits // 8
    for size in (model.hidden_size, model.expert_width):
        if size * row_bytes % 16:
            return f"needs rows of a multiple of 16 bytes; {size} values of {dtype} are not: sizes divisible by 8 are"
    return None


def _not_for_triton(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"computes in bf16, this run in {dtype}. Use precision=bf16, or model.moe.backend=auto"
    missing = triton_obstacle(device, BF16_CAPABILITY) or _triton_disagrees(device)
    return missing and f"{missing}. Use model.moe.backend=auto"


def _not_native(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"computes in bf16, this run in {dtype}. Use precision=bf16, or model.moe.backend=auto"
    if device.type != "cpu":
        return "is for a CPU, and this run is on a GPU. Use model.moe.backend=auto"
    missing = native.obstacle() or _native_fails()
    return missing and f"{missing}. Use model.moe.backend=auto"


@cache
def _native_fails() -> str | None:
    return disagreement(native_experts, experts_with(Reference()), torch.device("cpu"), run=routed_experts)


def native_left_out(available: Sequence[str], device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps `native` from a processor that it is made for; None: nothing does, or it is not made for this one."""
    if "native" in available or not native.made_for(device, dtype):
        return None
    return native.obstacle() or _native_fails() or "cannot run on every node"


@cache
def _triton_disagrees(device: torch.device) -> str | None:
    from ops.triton.gemm_backend import TritonTools

    return disagreement(experts_with(TritonTools()), experts_with(Reference()), device, run=routed_experts)


def _not_for_te(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"computes in bf16, this run in {dtype}. Use precision=bf16, or model.moe.backend=auto"
    if device.type != "cuda":
        return "needs a GPU, and this run is on a CPU. Use model.moe.backend=auto"
    missing = _te_fails(device)
    return missing and f"{missing}. Use model.moe.backend=auto"


@cache
def _te_fails(device: torch.device) -> str | None:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a half-installed package raises more than ImportError
        return f"needs the package transformer-engine, which does not import ({error})"
    return disagreement(te_experts, experts_with(Reference()), device)


Obstacle = Callable[[ModelConfig, torch.device, torch.dtype], str | None]
OBSTACLES: dict[str, Obstacle] = {
    "native": _not_native,
    "grouped_mm": _not_for_grouped_mm,
    "triton": _not_for_triton,
    "te": _not_for_te,
}
"""Why a backend cannot run this model on this device, in words that follow its name; None: it can. A backend without an
entry always can."""


def available_backends(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that can run, in the order of BACKENDS."""
    return [name for name in BACKENDS if name not in OBSTACLES or OBSTACLES[name](model, device, dtype) is None]


def choose_backend(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, available: list[str] | None = None
) -> tuple[str, str]:
    """(backend, why) for model.moe.backend, auto by rule. A training run measures instead (training.expert_backend).

    Args:
        available: those that auto chooses from; None: all that can run here.

    Raises:
        ValueError: the one asked for cannot run.
    """
    wanted = model.moe.backend
    if wanted != "auto":
        missing = OBSTACLES[wanted](model, device, dtype) if wanted in OBSTACLES else None
        if missing:
            raise ValueError(f"model.moe.backend={wanted} {missing}")
        return wanted, "asked for"
    available = available_backends(model, device, dtype) if available is None else available
    if device.type == "cuda" and dtype == torch.bfloat16 and "grouped_mm" in available:
        return "grouped_mm", "one launch for all experts"
    if device.type == "cpu" and "native" in available and not native.slower_than_onednn():
        return "native", "our products for AVX512-BF16, compiled here"
    if device.type == "cpu":
        return "fused", "one operation, which keeps less for the backward pass than loop"
    if dtype != torch.bfloat16:
        return "loop", f"{dtype} on a GPU"
    missing = _misaligned(model, dtype) or _grouped_mm_fails(device, dtype) or "cannot run on every node"
    return "loop", f"one product per expert; grouped_mm {missing}"


class Experts(nn.Module):
    """This rank's experts: E is cut over expert-parallel, F over expert-tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, *, backend: str | Tools, dtype: torch.dtype, groups: Groups):
        super().__init__()
        self.activation = model.activation
        self.backend = BACKENDS[backend] if isinstance(backend, str) else experts_with(backend)
        self.gathers = backend in GATHER or not isinstance(backend, str)
        self.etp, self.ffn_hidden_size = groups.etp, model.expert_width
        self.chunk_rows = model.moe.expert_chunk_rows
        self.recompute = "activation" in model.recompute and backend in BACKENDS and backend not in KEEP_PRODUCTS_ONLY
        local, hidden = model.moe.num_experts // groups.ep.size(), model.hidden_size
        width, gates = model.expert_width // groups.etp.size(), input_projections(model.activation)
        self.w_in = nn.Parameter(torch.empty(local, hidden, gates, width, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(local, width, hidden, dtype=dtype))
        placed = [
            (self.w_in, 3, (model.init_scale / hidden) ** 0.5),
            (self.w_out, 1, (model.init_scale / model.expert_width) ** 0.5),
        ]
        self.b_in: nn.Parameter | None = None
        self.b_out: nn.Parameter | None = None
        if model.moe.expert_bias:
            self.b_in = nn.Parameter(torch.empty(local, gates, width, dtype=dtype))
            # Cut as well, though every rank's partial sum has all D columns: each rank adds its own columns, once.
            self.b_out = nn.Parameter(torch.empty(local, hidden // groups.etp.size(), dtype=dtype))
            placed += [(self.b_in, 2, 0.0), (self.b_out, 1, 0.0)]
            self.b_in.no_decay = self.b_out.no_decay = True
            before = groups.etp.rank() * self.b_out.shape[1]
            self.columns = (before, hidden - before - self.b_out.shape[1])
            """Before and after those of b_out."""
        for weight, axis, std in placed:
            set_sharding(weight, (0, groups.ep), (axis, groups.etp), std=std, per_expert=True)
            # Megatron-Core then reduces these over the expert-data-parallel group; needed at ep = 1 as well.
            weight.allreduce = False

    def forward(self, routed: Routed, counts: Sequence[int], dropout: Dropout | None = None) -> Tensor:
        """counts: rows of each expert. Returns [R, D], partial sums over etp when F is cut."""
        in_pieces = self.chunk_rows is not None and len(routed) > self.chunk_rows
        in_place = self.gathers and not in_pieces and not routed.padded
        origin = (routed.origin,) if in_place else ()

        def run(rows: slice, x: Tensor, counts: Sequence[int], w_in: Tensor, w_out: Tensor, *b_in: Tensor) -> Tensor:
            keep = dropout and dropout.factors(rows, self.etp.rank(), self.etp.size(), x.dtype)
            run = partial(checkpointed, self.backend, save_ops=MATMUL_OPS) if self.recompute else self.backend
            return run(x, counts, w_in, w_out, self.activation, *(b_in or (None,)), keep, *origin)

        weights = (self.w_in, self.w_out) if self.b_in is None else (self.w_in, self.w_out, self.b_in)
        x = routed.x_TD if in_place else routed.gather()
        if in_pieces:
            y_RD = InPieces.apply(run, self.chunk_rows, counts, x, *weights)
        else:
            y_RD = run(slice(None), x, counts, *weights)
        return y_RD if self.b_out is None else y_RD + of_rows(F.pad(self.b_out, self.columns), counts)


class DenseFFN(nn.Module):
    """The feed-forward layer of a dense block, F cut over tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Groups, *, width: int | None = None):
        """width: F; None: model.ffn_hidden_size."""
        super().__init__()
        self.activation, width = model.activation, width or model.ffn_hidden_size
        self.recompute = "activation" in model.recompute
        linear = {"config": config, "bias": False, "init_method": None, "tp_group": groups.tp}
        into = {"gather_output": False, **linear}
        # Gate and up are separate layers, so that a tensor-parallel slice of each is a slice of the whole.
        self.up = tp.ColumnParallelLinear(model.hidden_size, width, **into)
        self.gate = None
        if input_projections(model.activation) == 2:
            self.gate = tp.ColumnParallelLinear(model.hidden_size, width, **into)
        self.down = tp.RowParallelLinear(width, model.hidden_size, input_is_parallel=True, skip_bias_add=True, **linear)
        for layer in filter(None, (self.up, self.gate)):
            set_sharding(layer.weight, (0, groups.tp), std=(model.init_scale / model.hidden_size) ** 0.5)
        set_sharding(self.down.weight, (1, groups.tp), std=(model.init_scale / width) ** 0.5)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return checkpointed(self._run, x_SBD, save_ops=MATMUL_OPS) if self.recompute else self._run(x_SBD)

    def _run(self, x_SBD: Tensor) -> Tensor:
        parts = [layer(x_SBD)[0] for layer in (self.gate, self.up) if layer is not None]
        return self.down(activate(parts, self.activation))[0]
