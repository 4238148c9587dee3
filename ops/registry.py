"""The registry of implementations: which one of an operation runs is verified, chosen and explained here.

At the start of a run a candidate runs its operation's trial, shaped by the run's own configuration, and is used only if
its results and gradients are the reference's. Any exception counts as a disagreement: a half-installed package raises
more than ImportError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor

from ops.autotune import Memory
from ops.operation import Implementation, Operation, Row, T, Unavailable, brief, is_absent
from ops.run_context import RunContext


def _cpp_kernels() -> Mapping[str, Implementation[Any]]:
    try:
        from ops.cpp.implementations import IMPLEMENTATIONS
    except ModuleNotFoundError as error:  # the folder was deleted
        if error.name not in ("ops.cpp", "ops.cpp.implementations"):
            raise
        return {}
    return IMPLEMENTATIONS


CPP_KERNELS = _cpp_kernels()
"""By the field of the operation, whose other implementations for a CPU come after them."""


def candidates(operation: Operation[T]) -> list[Implementation[T]]:
    """The implementations of an operation besides its reference, in order of preference."""
    kernel = CPP_KERNELS.get(operation.field)
    return [*([] if kernel is None else [kernel]), *operation.implementations]


@dataclass
class Findings(Generic[T]):
    """What an operation's trials showed on this rank."""

    verified: dict[str, tuple[Implementation[T], T, str]] = field(default_factory=dict)
    """By name, in order of preference, the reference last, each with why it may run."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    absent: list[str] = field(default_factory=list)
    """Not installed."""
    refused: bool = False


def largest_difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of tensors, by norm; inf where it is not a number."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        difference = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def select(
    operations: Sequence[Operation[Any]], context: RunContext, memory: Memory | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """(the implementation of each operation that the run uses, by field; the rows of the start table). All ranks choose
    the same: implementations exchange different messages, and what ranks compute alike is to be alike to the bit.

    Args:
        memory: of a training run; None: nothing is measured.

    Raises:
        ValueError: an implementation was asked for, or must run, that cannot.
    """
    found = [(operation, examine(operation, context)) for operation in operations if operation.is_used(context)]
    everyone: list[list[list[str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, [list(findings.verified) for _, findings in found])
    chosen, rows = {}, []
    for (operation, findings), names in zip(found, zip(*everyone, strict=True), strict=True):
        _keep_common(operation, findings, names, context)
        row = _choose(operation, findings, context, memory)
        chosen[operation.field] = findings.verified[row.name][1]
        rows.append(operation.describe(context, row))
    return chosen, rows


def examine(operation: Operation[T], context: RunContext) -> Findings[T]:
    """Tries the implementation that the setting asks for, or all in their order: up to the first that passes, or each
    where one is chosen by measuring.

    Raises:
        ValueError: the one asked for, or that must run, does not pass.
    """
    findings, wanted, reference = Findings[T](), operation.wanted(context), operation.reference(context)
    plain, reason, note = reference.loaded(context), None, ""
    asked = [i for i in candidates(operation) if i.name == wanted]
    meant = [i for i in candidates(operation) if not i.mismatch(context) and i.is_supported(context)]
    if wanted == "native" and not asked:
        reason = "needs the folder ops/cpp, which this copy lacks"
        raise ValueError(operation.refusal.format(name=wanted, reason=reason, note=f"{wanted} {reason}"))
    expected = cache(lambda: operation.trial(plain, context))
    for candidate in asked or (meant if wanted == "auto" else []):
        reason = candidate.mismatch(context) or candidate.unsupported_reason(context)
        try:
            if reason is None:
                value, why = _tried(operation, candidate, context, expected, operation.standard or reference.name)
                findings.verified[candidate.name] = candidate, value, candidate.why or why
                if operation.tune is None:
                    break
                continue
        except ImportError as error:
            reason = note = str(error)
            findings.absent.append(str(candidate))
            continue
        except Unavailable as error:
            reason, findings.refused = str(error), True
        note = f"{candidate} {reason}"
        findings.notes.append(note)
    if not findings.verified and (asked or operation.must_run(context)):
        raise ValueError(operation.refusal.format(name=wanted, reason=reason, note=note))
    findings.verified[reference.name] = reference, plain, reference.why
    return findings


def _tried(
    operation: Operation[T],
    candidate: Implementation[T],
    context: RunContext,
    expected: Callable[[], Sequence[Tensor]],
    standard: str,
) -> tuple[T, str]:
    """The implementation, and how close it comes to the reference.

    Raises:
        ImportError: it is not installed.
        Unavailable: why it is left out.
    """
    problem: Exception | None = None
    loaded: list[T] = []
    try:
        loaded.append(candidate.loaded(context))
    except Unavailable as error:
        problem = error
    except Exception as error:
        problem = error if is_absent(error) else Unavailable(f"does not import ({brief(error)})")
    _raise_together(operation, context, problem, ImportError(f"not installed: {candidate}"))
    (value,), wanted, difference = loaded, expected(), float("inf")
    try:
        difference = largest_difference(operation.trial(value, context), wanted)
        if difference > operation.tolerance[context.dtype]:
            problem = Unavailable(f"differs from {standard} by {difference:.0e} and is left out")
    except Exception as error:
        problem = Unavailable(f"failed its trial ({brief(error)})")
    _raise_together(operation, context, problem, Unavailable("differs on another rank and is left out"))
    return value, f"equals {standard} within {difference:.0e} on a random batch"


def _raise_together(
    operation: Operation[Any], context: RunContext, problem: Exception | None, elsewhere: Exception
) -> None:
    """Raises the problem of this rank, or where trials send messages that of another rank."""
    if operation.is_collective:
        fine = torch.tensor(int(problem is None), device=context.device)
        dist.all_reduce(fine, op=dist.ReduceOp.MIN, group=context.groups.world)
        problem = problem or (None if fine else elsewhere)
    if problem:
        raise problem


def _keep_common(
    operation: Operation[T], findings: Findings[T], names: Sequence[list[str]], context: RunContext
) -> None:
    """Leaves what every rank has verified."""
    firsts = sorted({own[0] for own in names})
    lost = [name for name in findings.verified if not all(name in own for own in names)]
    findings.notes += [f"{findings.verified.pop(name)[0]} cannot run on every node" for name in lost]
    if operation.tune is None and len(firsts) > 1:
        findings.notes, findings.refused = [f"nodes differ in what they have: {', '.join(firsts)}"], True
        if operation.must_run(context):
            reason = f": {findings.notes[0]}"
            raise ValueError(operation.refusal.format(name=operation.wanted(context), reason=reason, note=reason))
    findings.refused |= bool(lost)


def _choose(operation: Operation[T], findings: Findings[T], context: RunContext, memory: Memory | None) -> Row:
    wanted, verified, refused = operation.wanted(context), findings.verified, findings.refused
    name = next(name for name, (implementation, _, _) in verified.items() if implementation.is_default(context))
    why = verified[name][2]
    if wanted in verified:
        name, why = wanted, "asked for"
    elif operation.tune:
        answer = [(name, why, False)]
        if memory and context.runtime.world.rank == 0:
            answer = [operation.tune({n: value for n, (_, value, _) in verified.items()}, (name, why), context, memory)]
        dist.broadcast_object_list(answer)
        name, why, failed = answer[0]
        refused |= failed
    absent = [f"not installed: {', '.join(findings.absent)}"] if findings.absent and name == list(verified)[-1] else []
    return Row(operation.name, name, "; ".join(filter(None, [why, *(findings.notes or absent)])), refused)
