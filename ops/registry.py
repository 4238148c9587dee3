"""Optional fast implementations, used only after they have shown that they compute the same.

NVIDIA Apex and TransformerEngine are never required. Where one of them is importable, its piece is run beside our
reference on a small random batch on this very device; it is used when the results agree and otherwise left out, and
the start table says which and why. Any exception counts as a disagreement: a half-installed package raises more than
ImportError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(x [..., D], weight [D], eps) -> normalised x."""


@dataclass(frozen=True)
class Choice:
    """One line of the start table."""

    part: str
    name: str
    why: str
    refused: bool = False
    """Whether something faster was found here and left out."""


class Unavailable(Exception):
    """Says in words what an implementation lacks here."""


@dataclass(frozen=True)
class Candidate:
    """An optional implementation; `load` imports it and may raise anything: Unavailable with words for the table."""

    name: str
    load: Callable[[], Any]


def largest_difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of tensors, by norm; inf where it is not a number."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        difference = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def select(
    part: str,
    candidates: Sequence[Candidate],
    reference: tuple[str, Any],
    run: Callable[[Any], Sequence[Tensor]],
    tolerance: float,
) -> tuple[Any, Choice]:
    """The first candidate whose `run` equals the reference's, else the reference, with the reason.

    Args:
        run: computes the results to compare with an implementation; called once for each.
        tolerance: largest relative difference that rounding explains.
    """
    name, fallback = reference
    found: list[str] = []
    wanted: Sequence[Tensor] | None = None
    for candidate in candidates:
        try:
            loaded = candidate.load()
        except ImportError:
            continue
        except Unavailable as what:
            found.append(f"{candidate.name} {what}")
            continue
        except Exception as error:
            found.append(f"{candidate.name} does not import ({type(error).__name__})")
            continue
        wanted = wanted if wanted is not None else run(fallback)
        try:
            difference = largest_difference(run(loaded), wanted)
        except Exception as error:
            found.append(f"{candidate.name} failed its trial ({type(error).__name__})")
            continue
        if difference <= tolerance:
            equal = f"equals torch's within {difference:.0e} on a random batch"
            return loaded, Choice(part, candidate.name, "; ".join([*found, equal]), bool(found))
        found.append(f"{candidate.name} differs from torch's by {difference:.0e} and is left out")
    names = ", ".join(c.name for c in candidates)
    return fallback, Choice(part, name, "; ".join(found) or f"not installed: {names}", bool(found))


Picked = tuple[Any, Choice]


def agreed(picked: Mapping[str, tuple[Picked, Any]]) -> dict[str, Picked]:
    """What every rank has picked; where nodes differ, torch's on all of them: implementations exchange different
    messages, and what ranks compute alike they are to compute alike to the bit.

    Args:
        picked: by name, this rank's pick and torch's implementation.
    """
    mine = {name: choice.name for name, ((_, choice), _) in picked.items()}
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    result = {}
    for name, (pick, plain) in picked.items():
        names = sorted({theirs[name] for theirs in everyone})
        differ = Choice(pick[1].part, "torch", f"nodes differ in what they have: {', '.join(names)}", True)
        result[name] = pick if len(names) == 1 else (plain, differ)
    return result


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _apex_rms_norm() -> Norm:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps)


def select_norm(
    device: torch.device, dtype: torch.dtype, widths: Sequence[int], ours: Sequence[Candidate] = ()
) -> tuple[Norm, Choice]:
    """RMSNorm: Apex's fused one where it equals torch's, output and both gradients; before it what the caller has.

    Args:
        widths: of the rows that it is for.
    """

    def trial(norm: Norm, width: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, weight, grad = (torch.randn(*s, generator=generator) for s in ((8, width), (width,), (1, 1)))
        x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
        y = norm(x, weight, 1e-6)
        y.backward(grad.to(device, dtype) * y.detach())
        assert x.grad is not None and weight.grad is not None
        return [y, x.grad, weight.grad]

    def run(norm: Norm) -> list[Tensor]:
        return [result for width in widths for result in trial(norm, width)]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    candidates = [*ours, Candidate("Apex", _apex_rms_norm)]
    return select("norm", candidates, ("torch rms_norm", torch_rms_norm), run, tolerance)


def _te_adam() -> type[torch.optim.Optimizer]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam


def _apex_adam() -> type[torch.optim.Optimizer]:
    from apex.optimizers import FusedAdam

    return FusedAdam


def select_adam(device: torch.device) -> tuple[type[torch.optim.Optimizer], Choice]:
    """AdamW: TransformerEngine's or Apex's FusedAdam where it reproduces torch's over five steps."""

    def run(optimizer: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=generator).to(device).requires_grad_() for n in (7, 1000)]
        adam = optimizer(weights, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for _ in range(5):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator).to(device)
            adam.step()
        return [w.detach() for w in weights]

    candidates = [Candidate("TransformerEngine FusedAdam", _te_adam), Candidate("Apex FusedAdam", _apex_adam)]
    reference = ("torch AdamW, fused", torch.optim.AdamW)
    return select("optimizer", candidates, reference, run, tolerance=1e-5)
