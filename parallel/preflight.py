"""Checks every node before training starts: compute and link speed, free memory, and access to the storage. One slow
node slows down all others, and during training it cannot be told apart from them."""

import os
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.process_groups import Runtime

SLOW = 0.5
"""A rank is reported if its rate is below this fraction of the median rank's."""


@dataclass(frozen=True)
class Report:
    """The measurements of one rank."""

    rank: int
    host: str
    free_memory: float
    """Bytes of its GPU, or its share of the machine's available memory."""
    free_disk: float
    """Bytes on the file system of the run directory."""
    disk_error: str | None
    """Why the run directory cannot be written; None: it can."""
    flops: float
    """FLOP/s of a matrix product."""
    bandwidth: float | None
    """Bytes per second to another node, or to another rank if there is one node; None: there is no other rank."""


def inspect(runtime: Runtime, folder: Path) -> list[Report]:
    """Measures and gathers the reports of all ranks, in rank order. Every rank calls this together. Takes about a
    second, plus the time NCCL needs to connect.

    Args:
        folder: the run directory; it or one of its parents exists.
    """
    folder = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    device, world = runtime.device, runtime.world
    free_disk, disk_error = _look_at_disk(folder)
    mine = Report(
        rank=world.rank,
        host=os.uname().nodename,
        free_memory=_free_memory(device, world.local_size),
        free_disk=free_disk,
        disk_error=disk_error,
        flops=_matmul_rate(device),
        bandwidth=_bandwidth(runtime) if world.size > 1 else None,
    )
    reports: list[Any] = [None] * world.size
    dist.all_gather_object(reports, mine)
    return reports


def find_problems(reports: list[Report], *, memory: float, disk: float) -> dict[str, list[str]]:
    """Node -> problems found on it; nodes without problems are left out.

    Args:
        memory: bytes that a rank needs.
        disk: bytes that the run will write.
    """
    found: dict[str, list[str]] = {}

    def report_problem(report: Report, text: str) -> None:
        found.setdefault(report.host, []).append(f"rank {report.rank}: {text}")

    for what, unit, rate in _rates(reports):
        median = statistics.median(rate.values()) if rate else 0.0
        for report in reports:
            if rate.get(report.rank, median) < SLOW * median:
                share = rate[report.rank] / median
                report_problem(report, f"{what} {rate[report.rank] / 1e9:.3g} {unit}, {share:.0%} of the median rank's")
    for report in reports:
        if report.disk_error:
            report_problem(report, report.disk_error)
        elif report.free_disk < disk:
            report_problem(
                report, f"{report.free_disk / 1e9:.3g} GB of disk are free, a checkpoint takes {disk / 1e9:.3g}"
            )
        if report.free_memory < memory:
            needed = f"the run takes about {memory / 1e9:.3g}"
            report_problem(report, f"{report.free_memory / 1e9:.3g} GB of memory are free, {needed}")
    return found


def medians(reports: list[Report]) -> str:
    """The rates of the median rank, as text."""
    rates = [(what, unit, statistics.median(rate.values())) for what, unit, rate in _rates(reports) if rate]
    return ", ".join(f"{what} {median / 1e9:.3g} {unit}" for what, unit, median in rates)


def _rates(reports: list[Report]) -> list[tuple[str, str, dict[int, float]]]:
    return [
        ("matrix products", "GFLOP/s", {r.rank: r.flops for r in reports}),
        ("links", "GB/s", {r.rank: r.bandwidth for r in reports if r.bandwidth is not None}),
    ]


def _look_at_disk(folder: Path) -> tuple[float, str | None]:
    """(free bytes, why the directory cannot be written). Detects file systems that are not mounted on a node."""
    trial = folder / f".preflight-{uuid.uuid4().hex[:8]}"
    try:
        stat = os.statvfs(folder)
        trial.write_bytes(bytes(2**20))
        trial.unlink()
    except OSError as error:
        return 0.0, f"{folder} cannot be written: {error.strerror}"
    return float(stat.f_bavail * stat.f_frsize), None


def _free_memory(device: torch.device, local_size: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return psutil.virtual_memory().available / local_size


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    """The shortest duration of four calls; the first is a warm-up."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _matmul_rate(device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best_seconds(lambda: a @ a, device)


def _bandwidth(runtime: Runtime) -> float:
    """Bytes per second to the faster of two neighbors, so that a slow neighbor does not make this rank look slow."""
    world, device = runtime.world, runtime.device
    bytes_sent = 2**28 if device.type == "cuda" else 2**22
    outgoing = torch.zeros(bytes_sent, dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)
    best = 0.0
    for partner in neighbours(world.rank, world.size, world.local_size):

        def exchange(partner: int | None = partner) -> None:
            if partner is not None:
                pair = [dist.P2POp(dist.isend, outgoing, partner), dist.P2POp(dist.irecv, incoming, partner)]
                for request in dist.batch_isend_irecv(pair):
                    request.wait()

        dist.barrier()
        seconds = _best_seconds(exchange, device)
        if partner is not None:
            best = max(best, bytes_sent / seconds)
    return best


def neighbours(rank: int, size: int, local_size: int) -> list[int | None]:
    """The rank that this one exchanges data with in each of two rounds: the rank with the same local rank on the next
    and the previous node, or with one node the next and the previous rank. None: no partner in this round, if their
    number is odd."""
    stride = local_size if local_size < size and size % local_size == 0 else 1
    place, count = rank // stride, size // stride
    found: list[int | None] = []
    for shift in (0, 1):
        other = ((place + shift) ^ 1) - shift  # 0-1 2-3 ..., then 1-2 3-4 ...
        if count % 2 == 0:
            other %= count
        found.append(rank + (other - place) * stride if 0 <= other < count else None)
    return found
