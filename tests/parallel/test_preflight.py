"""Nodes that fall short, drawn by hand and made on purpose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import ParallelConfig
from parallel import preflight
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.preflight import Report, find_problems, inspect, neighbours
from tests.parallel.helpers import started

WELL = [Report(rank, f"n{rank // 2}", 64e9, 1e12, None, 400e12, 40e9) for rank in range(8)]


def changed(rank: int, **what: object) -> list[Report]:
    return [replace(report, **what) if report.rank == rank else report for report in WELL]


def told(reports: list[Report]) -> dict[str, list[str]]:
    return find_problems(reports, memory=60e9, disk=5e11)


def test_well_is_well() -> None:
    assert told(WELL) == {}
    assert told([replace(WELL[0], bandwidth=None)]) == {}  # one rank has no links


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"flops": 190e12}, "matrix products 1.9e+05 GFLOP/s, 48% of the median rank's"),
        ({"bandwidth": 4e9}, "links 4 GB/s, 10% of the median rank's"),
        ({"free_memory": 50e9}, "50 GB of memory are free, the run takes about 60"),
        ({"free_disk": 1e9}, "1 GB of disk are free, a checkpoint takes 500"),
        ({"disk_error": "/runs cannot be written: Stale file handle"}, "/runs cannot be written: Stale file handle"),
    ],
)
def test_a_bad_rank_is_named_with_its_node(what: dict[str, object], text: str) -> None:
    assert told(changed(5, **what)) == {"n2": [f"rank 5: {text}"]}


def test_a_little_slower_is_no_reason() -> None:
    assert told(changed(3, flops=250e12, bandwidth=25e9)) == {}


@pytest.mark.parametrize(("size", "local_size"), [(2, 1), (4, 1), (8, 4), (8, 2), (5, 5), (6, 4), (12, 4), (3, 1)])
def test_neighbours_exchange_with_each_other(size: int, local_size: int) -> None:
    partners = [neighbours(rank, size, local_size) for rank in range(size)]
    for rank in range(size):
        for n, partner in enumerate(partners[rank]):
            assert partner is None or (partner != rank and partners[partner][n] == rank)
        assert any(partner is not None for partner in partners[rank])
    if (size, local_size) == (8, 2):  # four nodes: each meets the one before and the one after
        assert partners[3] == [1, 5] and partners[0] == [2, 6]


def look(world: World, folder: Path, slow: int) -> dict[str, list[str]]:
    """What the ranks find when one of them multiplies slowly and cannot write (rank function for the pool)."""
    with started(world, ParallelConfig()) as runtime:
        rate = preflight._matmul_rate
        if world.rank == slow:
            preflight._matmul_rate = lambda device: rate(device) / 100
            folder = Path("/proc/nothing")
        try:
            reports = inspect(runtime, folder)
        finally:
            preflight._matmul_rate = rate
        assert [report.rank for report in reports] == list(range(world.size))
        assert all(report.bandwidth > 0 for report in reports)
        return find_problems(reports, memory=1.0, disk=1.0)


def test_real_measurements_name_the_slow_rank(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(3, look, tmp_path / "not" / "there", 1, timeout=60)
    assert found == [found[0]] * 3
    ((_, texts),) = found[0].items()
    slow = [text for text in texts if "links" not in text]  # the links of a busy machine are what they are
    assert len(slow) == 2 and slow[0].startswith("rank 1: matrix products ")
    assert slow[1].startswith("rank 1: /proc cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_matmul_rate_is_arithmetic_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_best_seconds", lambda action, device: 0.5)
    assert preflight._matmul_rate(torch.device("cpu")) == 2 * 512**3 / 0.5
