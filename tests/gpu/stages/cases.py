"""Every kernel on real shapes beside torch in higher precision: the cases that `warmup` compiles and `correctness`
checks. A case returns pairs (got, wanted) by name; outputs that a kernel did not write are not numbers.

Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.stages.common import DEVICE, REHEARSE, bf16

Pairs = dict[str, tuple[Tensor, Tensor]]
SHAPES = {"Mixtral": (8, 4096, 14336), "Qwen3-MoE": (128, 2048, 768), "DeepSeek-V3": (32, 7168, 2048)}
"""(experts of a rank, hidden, expert hidden) of published models."""
if REHEARSE:
    SHAPES = {"tiny": (4, 128, 128)}

KERNELS_ONLY = False
"""Whether the cases of whole experts leave out the reference in fp64, of which a GPU cannot hold many at once."""


def counts_of(experts: int, rows: int) -> list[int]:
    """Uneven, an expert without rows, one with a single row."""
    shares = torch.linspace(0.25, 1.75, experts)
    counts = (shares / shares.sum() * rows).long().tolist()
    counts[0], counts[1] = 0, 1
    return counts


def experts_case(kind: str, model: str) -> Pairs:
    """Product, input gradient and weight gradient of one weight, of ragged rows."""
    from ops.fp8_numerics import RECIPES
    from ops.gemm_backend import Reference

    experts, hidden, width = SHAPES[model]
    experts = min(experts, 16)  # the reference computes in fp64
    counts = counts_of(experts, 8 * experts if REHEARSE else 128 * experts)
    x, dy = bf16(sum(counts), hidden, seed=1), bf16(sum(counts), width, seed=2)
    w = bf16(experts, hidden, width, scale=hidden**-0.5, seed=3)
    if kind == "grouped_mm":
        return _grouped_mm(x, w, dy, counts)
    from ops.triton.gemm_backend import Float8GemmBackend, TritonGemmBackend

    recipe = None if kind == "bf16" else RECIPES[kind]
    narrow = recipe is not None
    gemm = TritonGemmBackend() if recipe is None else Float8GemmBackend(recipe, narrow_weight_gradient=True)
    reference = Reference(recipe, narrow_weight_gradient=narrow)
    groups, weight = gemm.groups(counts, DEVICE), gemm.weight(w)
    got = {
        "forward": gemm.product(gemm.rows(x), weight.forward, groups, torch.bfloat16),
        "input gradient": gemm.product(gemm.rows(dy), weight.back, groups, torch.bfloat16),
        "weight gradient": gemm.weight_gradient(gemm.columns(x, groups), gemm.columns(dy, groups), groups, w),
    }
    if KERNELS_ONLY:
        return {}
    theirs, wanted = reference.groups(counts, DEVICE), reference.weight(w.double())
    columns = [reference.columns(t.double(), theirs) for t in (x, dy)]
    right = {
        "forward": reference.product(reference.rows(x.double()), wanted.forward, theirs, torch.float64),
        "input gradient": reference.product(reference.rows(dy.double()), wanted.back, theirs, torch.float64),
        "weight gradient": reference.weight_gradient(*columns, theirs, w.double()),
    }
    return {name: (got[name], right[name]) for name in got}


def _grouped_mm(x: Tensor, w: Tensor, dy: Tensor, counts: list[int]) -> Pairs:
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0).int().to(DEVICE)
    y = F.grouped_mm(*leaves, offs=ends)
    grads = torch.autograd.grad(y, leaves, dy)
    if KERNELS_ONLY:
        return {}
    wanted = [t.double().requires_grad_() for t in (x, w)]
    parts = zip(wanted[0].split(counts), wanted[1].unbind(0), strict=True)
    right = torch.cat([rows @ one for rows, one in parts])
    right_grads = torch.autograd.grad(right, wanted, dy.double())
    return {
        "forward": (y.detach(), right.detach()),
        "input gradient": (grads[0], right_grads[0]),
        "weight gradient": (grads[1], right_grads[1]),
    }


def linear_case(recipe: str) -> Pairs:
    """torch's scaled_mm behind our linear layer, beside the emulation."""
    from ops.fp8_numerics import RECIPES
    from ops.gemm_backend import Reference
    from ops.grouped_mlp import linear_with
    from ops.triton.scaled_mm import ScaledMmBackend

    rows, inner, outer = (32, 128, 128) if REHEARSE else (4096, 2048, 5632)
    results = []
    for kind in (ScaledMmBackend, Reference):
        leaves = [bf16(rows, inner, seed=1).requires_grad_(), bf16(outer, inner, seed=2).requires_grad_()]
        y = linear_with(kind(RECIPES[recipe], narrow_weight_gradient=True))(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, bf16(rows, outer, seed=3))])
    names = ("forward", "input gradient", "weight gradient")
    return {name: (got, wanted.double()) for name, got, wanted in zip(names, *results, strict=True)}


def rows_case() -> Pairs:
    """Tokens to rows and back."""
    from ops.permute import TORCH_PERMUTATION
    from ops.triton.permute import PERMUTATION as KERNELS

    tokens, hidden, top_k = (40, 64, 2) if REHEARSE else (8192, 2048, 8)
    choice = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0))[: tokens * top_k * 3 // 4]
    choice = choice.to(DEVICE)
    results = []
    for rows, dtype in ((KERNELS, torch.bfloat16), (TORCH_PERMUTATION, torch.float64)):
        x = bf16(tokens, hidden, seed=1).to(dtype).requires_grad_()
        gates = bf16(tokens, top_k, seed=2).to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_()
        taken = rows.permute(x, choice, top_k, False)
        out = rows.unpermute(taken, choice, gates, False)
        results.append([taken.detach(), out.detach(), *torch.autograd.grad(out, (x, gates), torch.ones_like(out))])
    names = ("gather", "weighted sum", "tokens' gradient", "gates' gradient")
    return {name: (got, wanted) for name, got, wanted in zip(names, *results, strict=True)}


def norm_case() -> Pairs:
    from ops.triton.rms_norm import rms_norm

    rows, hidden = (9, 96) if REHEARSE else (8192, 4096)
    x, weight, above = bf16(rows, hidden, seed=1), bf16(hidden, seed=2), bf16(rows, hidden, seed=3)
    results = []
    for norm, dtype in ((rms_norm, torch.bfloat16), (lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = norm(*leaves, 1e-6)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, above.to(dtype))])
    return {n: (a, b) for n, a, b in zip(("forward", "input", "weight"), *results, strict=True)}


def rotary_case() -> Pairs:
    """Forward and backward, of a slice of wider heads."""
    from ops.triton.rotary import apply_rotary

    s, b, heads, width = (7, 2, 3, 16) if REHEARSE else (2048, 4, 32, 128)
    x, angle = bf16(s, b, heads, 2 * width)[..., width:], torch.rand(s, b, 1, width // 2, device=DEVICE) * 6
    pairs = {}
    for name, sign in (("forward", 1), ("backward", -1)):
        out = apply_rotary(x, angle.cos(), angle.sin(), torch.empty_like(x), backward=sign < 0)
        turn = torch.polar(torch.ones_like(angle).double(), sign * angle.double())
        turned = torch.complex(*x.double().chunk(2, -1)) * turn
        pairs[name] = out, torch.cat([turned.real, turned.imag], -1)
    return pairs


def loss_case() -> Pairs:
    """Cross-entropy over a vocabulary whose gradient takes the logits' place."""
    from ops.triton.cross_entropy import _Triton

    tokens, vocabulary = (17, 300) if REHEARSE else (2048, 151936)
    logits = bf16(tokens, vocabulary, scale=3.0, seed=1)
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wanted = logits.double().requires_grad_()
    right = F.cross_entropy(wanted, labels, reduction="none")
    right_grad = torch.autograd.grad(right.sum(), wanted)[0]
    kernels, mine = _Triton(), logits.clone()
    largest, total, label = kernels.sums(mine, labels)
    loss = largest + total.log() - label
    kernels.become_gradient(mine, labels, largest, total, torch.ones_like(loss))
    return {"loss": (loss, right.detach()), "gradient": (mine, right_grad)}


def router_case(**options: Any) -> Pairs:
    """The fused router beside torch's operations, which test the same rule in fp32."""
    from ops.routing import Rule
    from ops.triton.router import route

    tokens, experts, top_k = (40, 16, 2) if REHEARSE else (16384, 128, 8)
    rule = Rule(
        top_k,
        score_function="sigmoid" if options.get("sigmoid") else "softmax",
        after=False,
        renormalize=True,
        scale=1.0,
    )
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    routing = route(logits.requires_grad_(), None, None, rule, 1)
    scores = logits.double().sigmoid() if rule.score_function == "sigmoid" else logits.double().softmax(-1)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = scores.gather(1, chosen)
    gates = gates / gates.sum(-1, keepdim=True)
    above = torch.linspace(-1, 1, top_k, device=DEVICE)
    got_grad = torch.autograd.grad((routing.gates_TK * above).sum(), logits)[0]
    right_grad = torch.autograd.grad((gates * above).sum(), logits)[0]
    return {
        "experts": (routing.experts_TK.double(), chosen.double()),
        "gates": (routing.gates_TK.detach(), gates.detach()),
        "gradient": (got_grad, right_grad.double()),
    }


def attention_case(kind: str) -> Pairs:
    """Documents, and a later shard of the queries, beside a mask in fp32."""
    from ops.attention_pieces import attention_pieces
    from ops.varlen_attention import joined_attention, masked_attention, varlen_attention

    attend = {"joined": joined_attention, "varlen": varlen_attention}[kind]
    sequence, heads, groups = (64, 4, 2) if REHEARSE else (2048, 16, 4)
    positions = torch.cat([torch.arange(n) for n in (sequence // 2 - 3, 1, sequence // 2 + 2)])[None]
    pieces = attention_pieces(positions, 1, 2, True)
    q, above = (bf16(1, heads, sequence // 2, 128, seed=s) for s in (1, 4))
    k, v = (bf16(1, groups, sequence, 128, seed=s) for s in (2, 3))
    results = []
    for run, dtype in ((attend, torch.bfloat16), (masked_attention, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = run(*leaves, pieces)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, above.to(dtype))])
    return {n: (a, b.double()) for n, a, b in zip(("forward", "q", "k", "v"), *results, strict=True)}


def cases() -> dict[str, tuple[Callable[[], Pairs], float]]:
    """(case, the largest relative error) by name."""
    found: dict[str, tuple[Callable[[], Pairs], float]] = {}
    for model in SHAPES:
        for kind in ("bf16", "blockwise", "rowwise", "tensorwise", "grouped_mm"):
            bar = 4e-3 if kind in ("bf16", "grouped_mm") else 5e-3
            found[f"{kind} experts, {model}"] = (lambda kind=kind, model=model: experts_case(kind, model)), bar
    for recipe in ("blockwise", "rowwise", "tensorwise") if not REHEARSE else ():
        found[f"scaled_mm, {recipe}"] = (lambda recipe=recipe: linear_case(recipe)), 5e-3
    found["rows"] = rows_case, 5e-3
    found["norm"] = norm_case, 5e-3
    found["rotary"] = rotary_case, 5e-3
    found["loss"] = loss_case, 5e-3
    found["router, softmax"] = router_case, 1e-5
    found["router, sigmoid"] = (lambda: router_case(sigmoid=True)), 1e-5
    for kind in ("joined", "varlen") if not REHEARSE else ("joined",):
        found[f"attention, {kind}"] = (lambda kind=kind: attention_case(kind)), 1e-2
    return found
