"""What a step of a run costs in collectives over all ranks."""

import functools
import inspect
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.schema import Config
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, with_layout, write_corpus

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather_object",
    "reduce",
    "reduce_scatter_tensor",
    "scatter_object_list",
)


def count(world: World, config: Config, further: bool) -> list[list[tuple[str, int]]]:
    """(name, bytes) of each collective over all ranks, for every step of a run, beginning with its gradients (rank
    function for the pool). `further`: with another one in each step."""
    steps: list[list[tuple[str, int]]] = []

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        if steps and given.get("group") in (None, dist.group.WORLD):
            tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
            steps[-1].append((function.__name__, sum(t.nbytes for t in tensors)))
        return function(*args, **kwargs)

    compute, update = Engine.compute_gradients, Engine.update

    def next_step(engine: Engine, *args: Any, **kwargs: Any) -> None:
        steps.append([])
        compute(engine, *args, **kwargs)

    def more(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        dist.all_reduce(torch.ones(1))
        return update(engine, *args, **kwargs)

    spied = {name: functools.partial(counted, getattr(dist, name)) for name in COLLECTIVES}
    engine = {"compute_gradients": next_step} | ({"update": more} if further else {})
    with unittest.mock.patch.multiple(dist, **spied), unittest.mock.patch.multiple(Engine, **engine):
        assert train(world, config) == 0
    return steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def four_steps(corpus: Path, run_dir: Path, **degrees: int) -> Config:
    config = with_layout(tiny_config(corpus, run_dir, steps=5, log_every=2), **degrees)
    config.eval.sample_tokens = 0
    return config


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"pp": 2, "ep": 2}], ids=str)
def test_one_small_all_reduce(degrees: dict[str, int], corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """Norm, loss and four states; in a logged step also three figures of each rank and, of the sparse layer, the loads
    of 4 experts, the tokens and 6 metrics. The last step is followed by the evaluation at the end."""
    plain, logged = 8 * (1 + 1 + 4), 8 * (1 + 1 + 4 + 3 * 4 + 4 + 1 + 6)
    for steps in ranks.run(4, count, four_steps(corpus, tmp_path / "run", **degrees), False, timeout=120):
        assert steps[:4] == [[("all_reduce", plain)], [("all_reduce", logged)]] * 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 5]


def test_another_one_is_seen(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    for steps in ranks.run(2, count, four_steps(corpus, tmp_path / "run"), True, timeout=120):
        assert [len(step) for step in steps[:4]] == [2] * 4
