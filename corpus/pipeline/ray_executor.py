"""Runs the tasks of a stage as tasks of a Ray cluster."""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor

_ROOT = Path(__file__).resolve().parents[2]
_MOST_ATTEMPTS = 4
"""Of a task whose worker is lost."""


class RayExecutor(RayPipelineExecutor):
    """datatrove's, with another loop: its own waits forever for the task of a worker that was killed, and says nothing
    of what a task raises. A task is one of Ray here, of one core."""

    progress: Callable[[str, float], None] | None = None

    def run(self) -> None:
        """Runs the tasks that are not complete; those of lost workers are started again.

        Raises:
            ChildProcessError: the workers of a task are lost time after time.
            Exception: what a task raises.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        report, self.progress = self.progress or (lambda what, done: None), None  # it is not sent to workers
        self.save_executor_as_json()
        # Ray itself would repeat a task for which memory is short without end.
        submit: Any = ray.remote(num_cpus=1, max_retries=0)(run_preparation_task).remote
        executor, waiting, attempts = ray.put(self), deque(ranks), Counter[int]()
        running: dict[Any, int] = {}
        number = self.tasks - len(ranks)
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.popleft()
                    running[submit(executor, rank)] = rank
                (task,), _ = ray.wait([*running])
                rank = running.pop(task)
                try:
                    ray.get(task)
                except RayTaskError as error:
                    raise (error.cause or error) from None
                except RayError as error:
                    attempts[rank] += 1
                    if attempts[rank] >= _MOST_ATTEMPTS:
                        raise self._lost(rank, error) from None
                    waiting.append(rank)
                else:
                    number += 1
                    report("", number / self.tasks)
        finally:
            if running:  # what they do is kept
                ray.wait([*running], num_returns=len(running))

    def _lost(self, rank: int, error: Exception) -> ChildProcessError:
        missing = len(self.get_incomplete_ranks())
        what = str(error).strip().splitlines()
        return ChildProcessError(
            f"task {rank} has lost {_MOST_ATTEMPTS} workers, perhaps for want of memory ({type(error).__name__}: "
            f"{what[0] if what else ''}); {self.tasks - missing} of {self.tasks} tasks of this stage are complete: run "
            f"the same command again to continue. Logs: {self.logging_dir.path}/logs"
        )


def run_preparation_task(executor: RayExecutor, rank: int) -> None:
    """A task, in a worker of Ray."""
    # Messages are in the task's log; an error is raised in the command.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        executor._run_for_rank(rank, local_rank=1)


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS, or starts one on this machine.

    Raises:
        ValueError: there is none at RAY_ADDRESS.
        ChildProcessError: Ray does not start.
    """
    import ray

    if ray.is_initialized():
        return
    environment = {"PYTHONPATH": str(_ROOT), "TOKENIZERS_PARALLELISM": "false"}
    try:
        ray.init(runtime_env={"env_vars": environment}, log_to_driver=False)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        raise ValueError(f"executor=ray: no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    except Exception as error:  # Ray raises no narrower one where it has not started in half a minute
        raise ChildProcessError(f"executor=ray: Ray does not start here: {error}") from error
