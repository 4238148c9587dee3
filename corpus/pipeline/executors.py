"""Runs the stages of a plan by an executor of datatrove: processes of this machine, Slurm's job arrays, or Ray."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from conf.commands import PrepareSlurmConfig
from corpus.pipeline.account import write_json
from corpus.pipeline.blocks import blocks
from corpus.pipeline.plan import Plan, Stage
from corpus.pipeline.ray_executor import RayExecutor, connect

Progress = Callable[[str, float], None]
ROOT = Path(__file__).resolve().parents[2]


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with another pool: its own waits forever for the task of a worker that was killed."""

    progress: Progress | None = None
    preload: tuple[str, ...] = ()
    """Modules that every worker needs, besides those of the blocks."""

    def run(self) -> None:
        """Runs the tasks that are not complete.

        Raises:
            ChildProcessError: a worker was killed.
        """
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        report, self.progress = self.progress or (lambda what, done: None), None  # it is not sent to workers
        self.save_executor_as_json()
        context = get_context("forkserver")
        context.set_forkserver_preload(["corpus.pipeline.preload", *self.preload])
        workers = min(self.workers, len(ranks))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(workers,)) as pool:
            futures = [pool.submit(_run_task, self, rank) for rank in ranks]
            try:
                for number, future in enumerate(as_completed(futures), start=self.tasks - len(ranks) + 1):
                    future.result()
                    report("", number / self.tasks)
            except BrokenProcessPool:
                missing = self.get_incomplete_ranks()
                raise ChildProcessError(
                    f"a worker was killed, perhaps for want of memory; {self.tasks - len(missing)} of {self.tasks} "
                    "tasks of this stage are complete: run the same command again to continue, with fewer workers if "
                    f"memory is short. Logs: {self.logging_dir.path}/logs"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _begin_worker(workers: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """A worker whose command was killed must not go on writing beside the next command's."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run_task(executor: LocalExecutor, rank: int) -> None:
    # Messages are in the task's log; an error is raised in the parent.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        executor._run_for_rank(rank, local_rank=1)


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's, without the options that are not given, and without its jobs that add up statistics."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}

    def launch_merge_stats(self) -> None:
        pass


def run_local(plan: Plan, workers: int, progress: Progress) -> None:
    """Runs all stages, one after the other."""
    logger.remove()
    for stage in plan.stages:
        executor = LocalExecutor(
            blocks(plan, stage), tasks=stage.tasks, workers=workers, logging_dir=str(plan.logging_folder(stage))
        )
        executor.preload = tuple({package for step in plan.parsed for package in step.kind.packages})
        what = _described(stage)
        executor.progress = lambda _, done, what=what: progress(what, done)
        progress(what, 0.0)
        executor.run()


def run_ray(plan: Plan, workers: int, progress: Progress) -> None:
    """Runs all stages on a Ray cluster: that of RAY_ADDRESS, else one on this machine."""
    logger.remove()
    progress("starting Ray", 0.0)
    connect()
    for stage in plan.stages:
        executor = RayExecutor(blocks(plan, stage), **ray_options(plan, stage, workers))
        what = _described(stage)
        executor.progress = lambda _, done, what=what: progress(what, done)
        progress(what, 0.0)
        executor.run()


def ray_options(plan: Plan, stage: Stage, workers: int) -> dict[str, Any]:
    """The arguments of datatrove's RayPipelineExecutor besides the pipeline."""
    return {"tasks": stage.tasks, "workers": workers, "logging_dir": str(plan.logging_folder(stage))}


def submit_slurm(plan: Plan, workers: int, slurm: PrepareSlurmConfig) -> list[tuple[str, str]]:
    """Submits a job array for each stage that is not complete, each after the one before it. Returns what each does and
    its job id.

    Raises:
        ValueError: sbatch refuses a job, or jobs of an earlier call are still there.
    """
    logger.remove()
    listed = plan.folder / "slurm_jobs.json"
    if listed.exists() and (waiting := _in_queue(json.loads(listed.read_text()))):
        raise ValueError(f"jobs {', '.join(waiting)} of {plan.folder} are in the queue; wait for them, or scancel them")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID"):  # of a surrounding job: datatrove would run as its task
        os.environ.pop(name, None)
    before: SlurmExecutor | None = None
    submitted = []
    for stage in plan.stages:
        executor = SlurmExecutor(blocks(plan, stage), depends=before, **slurm_options(plan, stage, workers, slurm))
        try:
            executor.launch_job()
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"executor=slurm: sbatch refuses {plan.logging_folder(stage)}/launch_script.slurm; its message is above"
            ) from error
        if executor.job_id != -1:
            submitted.append((_described(stage), str(executor.job_id)))
            write_json(listed, [job for _, job in submitted])
            before = executor
    return submitted


def _in_queue(jobs: list[str]) -> list[str]:
    """Those of the jobs that are pending or running."""
    command = ["squeue", "--me", "--noheader", "--format=%F"]  # the job's id, of an array that of the whole
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [job for job in jobs if job in found]


def slurm_options(plan: Plan, stage: Stage, workers: int, slurm: PrepareSlurmConfig) -> dict[str, Any]:
    """The arguments of datatrove's SlurmPipelineExecutor besides the pipeline."""
    python = Path(sys.executable).parent
    more = dict(option.lstrip("-").split("=", 1) for option in slurm.sbatch)
    return {
        "tasks": stage.tasks,
        "workers": min(workers, stage.tasks),
        "time": slurm.time,
        "partition": slurm.partition,
        "qos": None,
        "cpus_per_task": slurm.cpus_per_task,
        "mem_per_cpu_gb": slurm.mem_per_cpu_gb,
        "job_name": f"prepare-{stage.name}",
        "logging_dir": str(plan.logging_folder(stage)),
        # Tasks of a stage that failed leave nothing for the next one to wait for.
        "sbatch_args": {"kill-on-invalid-dep": "yes", "chdir": str(ROOT), **more},
        "env_command": f'export PYTHONPATH="{ROOT}" PATH="{python}:$PATH" TOKENIZERS_PARALLELISM=false',
    }


def _described(stage: Stage) -> str:
    what = {
        "documents": "tokenising" if stage.name == "tokenise" else "filtering",
        "find": "finding duplicates",
        "finish": "writing the manifest",
    }
    return f"{what[stage.does]}, {stage.tasks} task{'s' if stage.tasks > 1 else ''}"
