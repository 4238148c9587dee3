"""Ranks that slow down the others are reported."""

import time

import pytest
import torch

from conf.schema import ParallelConfig
from parallel.collectives import sum_over_world
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.parallel.helpers import started
from training.stragglers import LINES, Stragglers, figures


def slow_rank(world: World, slow: int) -> tuple[list[dict[str, float | int]], list[str | None]]:
    """Lines of two steps each in which one rank takes its time (rank function for the pool)."""
    with started(world, ParallelConfig()) as runtime:
        stragglers = Stragglers()
        rows = []
        for _ in range(LINES + 2):
            for _ in range(2):
                stragglers.add(data=0.5 if world.rank == slow else 0.25, compute=0.5)
            sums = sum_over_world({"ranks": stragglers.local(memory_bytes=100 + world.rank)}, runtime.device)
            rows.append(figures(sums["ranks"]))
        return rows, [stragglers.straggler_warning(row) for row in rows]


def test_the_slowest_rank_is_named_once(ranks: RankPool) -> None:
    for rows, told in ranks.run(3, slow_rank, 2, timeout=60):
        assert rows[0] == {
            "rank_seconds": 0.75,
            "slowest_seconds": 1.0,
            "slowest_rank": 2,
            "data_wait": 0.5,
            "memory_bytes": 102,
        }
        assert rows == [rows[0]] * (LINES + 2)  # each line by itself
        assert told == [None] * (LINES + 2), "1.33 times the median is not worth a line"


def test_only_one_that_stays_slow_is_told(runtime: object) -> None:
    stragglers = Stragglers()
    stragglers.hosts = ["a", "b", "c"]

    def line(*own: float) -> str | None:
        return stragglers.straggler_warning(figures(torch.tensor([[seconds, 0.0, 1.0] for seconds in own])))

    told = [line(1, 1, 2) for _ in range(LINES - 1)] + [line(2, 1, 1)]  # another one, once
    told += [line(1, 1, 2) for _ in range(LINES + 3)]
    assert [n for n, text in enumerate(told) if text] == [2 * LINES - 1]
    assert told[2 * LINES - 1] == (
        "rank 2 on c slows down the others: 2 s per step, the median rank takes 1 s, in 10 consecutive logged steps"
    )


def test_the_wait_for_other_replicas_is_not_ones_own_time(ranks: RankPool) -> None:
    own = ranks.run(2, train_with_a_slow_rank, timeout=120)
    assert own[1] > 0.5 and own[0] < 0.5 * own[1]


def train_with_a_slow_rank(world: World) -> float:
    """Seconds that this rank took by itself for a step in which rank 1 was slow (rank function for the pool)."""
    from tests.parallel.helpers import Variant, build_engine, my_batches

    with started(world, ParallelConfig()) as runtime:
        engine = build_engine(runtime, Variant())
        engine.forward_backward(my_batches(runtime, 1), step=1)
        forward = engine.modules[0].forward

        def slowly(*args: object, **named: object) -> torch.Tensor:
            time.sleep(0.3)
            return forward(*args, **named)

        if world.rank == 1:
            engine.modules[0].forward = slowly
        engine.forward_backward(my_batches(runtime, 2), step=2).item()
        return engine.compute_timer.seconds()


@pytest.mark.parametrize(("own", "slowest"), [([1.0], 0), ([3.0, 1.0, 2.0, 2.0], 0)])
def test_figures(own: list[float], slowest: int) -> None:
    found = figures(torch.tensor([[seconds, 0.1, 5.0] for seconds in own], dtype=torch.float64))
    assert found["slowest_rank"] == slowest and found["slowest_seconds"] == max(own)
