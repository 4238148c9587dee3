"""`launch.prepare` with an executor: plans, runs or submits, and describes the result."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.commands import PrepareConfig
from corpus.integrity import sha256
from corpus.pipeline.plan import Plan, Refused, begin_or_resume, new_plan
from corpus.pipeline.steps import check_installed, read_steps
from corpus.shards import SUMMARY, read_manifest
from corpus.tokenizer_files import tokenizer_json

Progress = Callable[[str, float], None]


def prepare_at_scale(
    config: PrepareConfig,
    files: Sequence[str],
    prefix: Path,
    provide_tokenizer: Callable[[Path], None],
    progress: Progress,
) -> list[str]:
    """Prepares files into a folder of shards, and returns what there is to print. A call that was interrupted is
    continued: finished tasks are not run again.

    Args:
        provide_tokenizer: writes the tokenizer to a path.

    Raises:
        ValueError: the settings, or the input.
        ChildProcessError: a worker was killed.
    """
    check_installed(config.executor)
    steps = read_steps(config.prepare.steps)
    plan = new_plan(
        prefix,
        files,
        steps,
        config.task_mib,
        tokenizer=_tokenizer_identity(config),
        text_key=config.text_key,
        strict=config.strict,
        eod_token=config.eod_token,
        samples=config.samples,
    )
    _check_deduplications(plan)
    with _only_one(plan):
        try:
            resumed = begin_or_resume(plan)
            _begin(plan, provide_tokenizer)
        except ValueError:
            _remove_if_begun_now(plan)
            raise
        lines = [f"continuing {plan.folder}"] if resumed else []
        if config.executor == "slurm":
            return [*lines, *_submitted(plan, config)]
        from corpus.pipeline import executors

        run = executors.run_ray if config.executor == "ray" else executors.run_local
        try:
            run(plan, config.workers, progress)
        except Refused:
            shutil.rmtree(plan.folder, ignore_errors=True)
            raise
    shutil.rmtree(plan.folder, ignore_errors=True)
    return [*lines, *result_lines(prefix)]


def result_lines(folder: Path) -> list[str]:
    """The summary of a result for printing."""
    from corpus.pipeline.result import summary_lines

    manifest = read_manifest(folder)
    counts = f"{manifest['num_tokens']:,} tokens, documents: {manifest['num_documents']:,}"
    shards = f"{len(manifest['shards'])} shard{'s' if len(manifest['shards']) > 1 else ''}"
    return [*summary_lines(json.loads((folder / SUMMARY).read_text())), f"{folder}: {counts}, {shards}"]


def _submitted(plan: Plan, config: PrepareConfig) -> list[str]:
    from corpus.pipeline.executors import submit_slurm

    jobs = submit_slurm(plan, config.workers, config.slurm)
    return [
        *(f"submitted job {job}: {what}" for what, job in jobs),
        f"{plan.output} appears when the last job is complete, with {SUMMARY}. Logs: {plan.folder}/stages. If a job "
        "fails, run the same command again: finished tasks are kept",
    ]


def _tokenizer_identity(config: PrepareConfig) -> list[Any]:
    if config.tokenizer is not None:
        return ["given", sha256(tokenizer_json(config.tokenizer, "tokenizer"))]
    return ["trained", config.vocab_size, config.tokenizer_sample_mib]


def _check_deduplications(plan: Plan) -> None:
    from corpus.pipeline.deduplication import check

    for step in plan.parsed:
        if step.kind.does == "deduplicate":
            check(step, len(plan.tasks))


def _begin(plan: Plan, provide_tokenizer: Callable[[Path], None]) -> None:
    """What tasks need: the tokenizer, and the n-grams of evaluation tasks."""
    for step in plan.parsed:
        if step.name == "decontaminate":
            step.make().write_index()
    tokenizer = plan.folder / "tokenizer.json"
    if not tokenizer.exists():
        partial = tokenizer.with_suffix(".partial")
        provide_tokenizer(partial)
        os.replace(partial, tokenizer)


@contextmanager
def _only_one(plan: Plan) -> Iterator[None]:
    """Keeps others from the work folder.

    Raises:
        ValueError: another command works there.
    """
    plan.folder.mkdir(exist_ok=True)
    with open(plan.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another command works in {plan.folder}; wait for it, or choose another output") from None
        yield


def _remove_if_begun_now(plan: Plan) -> None:
    """Removes a work folder in which no task has run."""
    if not (plan.folder / "stages").exists():
        shutil.rmtree(plan.folder, ignore_errors=True)
