"""The loop over tasks of Ray, on a stand-in for Ray whose workers are lost as the test says."""

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed: bash launch/setup.sh data")

from corpus.pipeline.ray_executor import RayExecutor


class RayError(Exception):
    pass


class WorkerCrashedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"traceback of {cause}")
        self.cause = cause


class StandIn:
    """Runs tasks when they are waited for, those that were submitted last first."""

    def __init__(self, lost: dict[int, int]) -> None:
        """
        Args:
            lost: how many workers of each task are lost.
        """
        self.lost, self.most = Counter(lost), 0

    def remote(self, **options: Any) -> Any:
        assert options["max_retries"] == 0

        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, tasks: list[Any], num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(tasks))
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task: Any) -> None:
        function, (executor, rank) = task
        if self.lost[rank] > 0:
            self.lost[rank] -= 1
            raise WorkerCrashedError("killed")
        try:
            function(executor, rank)
        except Exception as error:
            raise RayTaskError(error) from error


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(lost: dict[int, int]) -> StandIn:
        ray, exceptions, found = ModuleType("ray"), ModuleType("ray.exceptions"), StandIn(lost)
        for name in ("remote", "put", "wait", "get"):
            setattr(ray, name, getattr(found, name))
        for error in (RayError, RayTaskError):
            setattr(exceptions, error.__name__, error)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
        return found

    return install


def executor(folder: Path, done: list[int], refused: int = -1) -> RayExecutor:
    def step(data: Any, rank: int, world_size: int) -> None:
        if rank == refused:
            raise ValueError(f"a.jsonl line {rank}")
        done.append(rank)

    return RayExecutor([step], tasks=6, workers=2, logging_dir=str(folder / "logs"))


def test_tasks_of_lost_workers_are_run_again(tmp_path: Path, stand_in: Any) -> None:
    ray, done, shown = stand_in({1: 3, 4: 1}), [], []
    made = executor(tmp_path, done)
    made.progress = lambda what, share: shown.append(share)
    made.run()
    assert sorted(done) == [0, 1, 2, 3, 4, 5] and ray.most == 2
    assert shown == [n / 6 for n in range(1, 7)]
    executor(tmp_path, done).run()
    assert len(done) == 6


def test_a_task_whose_workers_are_always_lost_is_given_up(tmp_path: Path, stand_in: Any) -> None:
    stand_in({3: 100})
    done: list[int] = []
    with pytest.raises(
        ChildProcessError, match=r"task 3 has lost 4 workers.*\(WorkerCrashedError: killed\).*same comm"
    ):
        executor(tmp_path, done).run()
    before = len(done)
    stand_in({})
    executor(tmp_path, done).run()  # the same command again
    assert sorted(done) == [0, 1, 2, 3, 4, 5] and before >= 3


def test_what_a_task_raises_is_raised(tmp_path: Path, stand_in: Any) -> None:
    stand_in({})
    with pytest.raises(ValueError, match=r"^a\.jsonl line 2$"):
        executor(tmp_path, [], refused=2).run()
