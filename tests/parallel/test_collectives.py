"""Each collective against plain tensor arithmetic over all ranks' inputs, which every rank can draw for itself."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ParallelConfig
from parallel import async_collectives, collectives
from parallel.env import World
from tests.parallel.helpers import started


def drawn(key: str, rank: int, rows: int) -> Tensor:
    """The rows that a rank has; small whole numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(97 * rank + sum(key.encode()))
    return torch.randint(-8, 9, (rows, 2, 3), generator=generator).double()


def run_all(world: World, cases: list[tuple[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient of the input) of each case on this rank, fed drawn inputs and drawn output gradients."""
    results = []
    with started(world, ParallelConfig()) as runtime:
        for name, rows in cases:
            group, function = runtime.groups.world, getattr(collectives, name, None)
            if name == "async_all_to_all":
                send, receive = rows[world.rank], [row[world.rank] for row in rows]
                x = drawn("x", world.rank, sum(send)).requires_grad_()
                y = async_collectives.run_collective(x, async_collectives.async_all_to_all(send, receive, group))
            elif name in ("GatherSequence", "async_all_gather", "async_reduce_scatter"):
                x = drawn(
                    "x", world.rank, rows * (world.size if name == "async_reduce_scatter" else 1)
                ).requires_grad_()
                y = (
                    function.apply(x, group)
                    if function
                    else async_collectives.run_collective(x, getattr(async_collectives, name)(group))
                )
            else:
                mine = rows[world.rank] if name == "GatherRagged" else sum(rows)
                x = drawn("x", world.rank, mine).requires_grad_()
                y = function.apply(x, rows, group)
            # A gradient that is not contiguous, as a transpose in the model makes it.
            y.backward(drawn("grad", world.rank, len(y)).transpose(1, 2).contiguous().transpose(1, 2))
            results.append((y.detach(), x.grad))
    return results


def expected(name: str, rows: Any, n: int) -> list[tuple[Tensor, Tensor]]:
    """The same from all ranks' inputs at once."""
    if name == "async_all_to_all":
        xs = [drawn("x", r, sum(rows[r])).split(rows[r]) for r in range(n)]
        columns = [[rows[sender][r] for sender in range(n)] for r in range(n)]
        grads = [drawn("grad", r, sum(columns[r])).split(columns[r]) for r in range(n)]
        return [(torch.cat([xs[s][r] for s in range(n)]), torch.cat([grads[s][r] for s in range(n)])) for r in range(n)]
    counts = rows if "Ragged" in name else [rows] * n
    if name in ("ReduceScatterRagged", "async_reduce_scatter"):
        total = sum(drawn("x", r, sum(counts)) for r in range(n)).split(counts)
        gathered = torch.cat([drawn("grad", r, counts[r]) for r in range(n)])
        return [(total[r], gathered) for r in range(n)]
    whole = torch.cat([drawn("x", r, counts[r]) for r in range(n)])
    total = sum(drawn("grad", r, sum(counts)) for r in range(n)).split(counts)
    return [(whole, total[r]) for r in range(n)]


CASES = {
    2: [
        ("GatherSequence", 2),
        ("async_all_to_all", [[1, 2], [3, 0]]),
        ("async_all_gather", 2),
        ("async_reduce_scatter", 3),
        ("GatherRagged", [3, 1]),
        ("ReduceScatterRagged", [1, 2]),
    ],
    3: [
        ("GatherSequence", 1),
        ("async_all_to_all", [[0, 4, 1], [2, 0, 0], [0, 1, 3]]),
        ("async_all_to_all", [[0, 0, 2], [0, 0, 1], [0, 0, 0]]),  # two ranks get nothing, one sends nothing
        ("async_all_gather", 1),
        ("async_reduce_scatter", 2),
        ("GatherRagged", [2, 0, 5]),
        ("GatherRagged", [0, 0, 0]),
        ("ReduceScatterRagged", [0, 4, 1]),
        ("ReduceScatterRagged", [0, 0, 0]),
    ],
}


@pytest.mark.parametrize("n", CASES)
def test_values_and_gradients(ranks, n):
    every = ranks.run(n, run_all, CASES[n], timeout=60)
    for case, (name, rows) in enumerate(CASES[n]):
        for rank, (y, grad) in enumerate(expected(name, rows, n)):
            got_y, got_grad = every[rank][case]
            assert torch.equal(got_y, y), (name, rows, rank)
            assert torch.equal(got_grad, grad), (name, rows, rank)


def sum_parts(world: World) -> tuple[dict[str, Tensor], int]:
    """The sums of what the ranks have, and the number of all-reduces (rank function for the pool)."""
    with started(world, ParallelConfig()), mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spied:
        mine = {name: drawn(name, world.rank, rows) for name, rows in (("a", 2), ("b", 0), ("c", 1))}
        mine["d"] = torch.tensor(float(world.rank), dtype=torch.float64)
        return collectives.sum_over_world(mine, torch.device("cpu")), spied.call_count


def test_everything_is_summed_in_one_all_reduce(ranks):
    for n in (1, 3):
        wanted = {name: sum(drawn(name, r, rows) for r in range(n)) for name, rows in (("a", 2), ("b", 0), ("c", 1))}
        wanted["d"] = torch.tensor(n * (n - 1) / 2, dtype=torch.float64)
        for sums, calls in ranks.run(n, sum_parts, timeout=60):
            assert calls == (n > 1) and [*sums] == [*wanted]
            assert all(torch.equal(sums[name], whole) for name, whole in wanted.items())
