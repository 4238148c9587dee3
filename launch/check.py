"""`python -m launch.check [--slurm[=OPTIONS]] [overrides] [ranks=N]`: validates a run on a login node, without a GPU:
layout, batch, data and memory. Exits with 2 and one message if the run cannot work.

--slurm prints the sbatch command of the run and asks Slurm whether it would accept the job; OPTIONS are those of sbatch
(--slurm='--partition=gpu --time=1-0').
--job is used by launch/job.sh inside a job: it also creates the run directory, and prints only the numbers of nodes and
tasks, the settings that parallel=auto has chosen, and the path of the run directory on standard output.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from conf import rules
from conf.commands import CheckConfig
from conf.printable import visible
from conf.schema import Config
from launch.cli import command
from launch.train import prepare_run
from parallel.env import simulated_ranks
from parallel.layout import Layout, describe
from training.console import Console
from training.output_redirect import redirect_output
from training.planner.auto import Choice, choose, choose_nodes
from training.requeue import FAILED, Start, attempt_id, forget_stop, record_start, restarts
from training.run_dir import checkpoint_dirs, expected_path, open_run_dir
from training.run_summary import summarize_run
from training.slurm import Allocation, Shape, allocation, ask_slurm, sbatch_command
from training.sweep import reset_unused


def main(config: CheckConfig, *, in_job: bool = False, slurm: str | None = None) -> int:
    """Prints a summary of the run. Returns the exit code: 0, or 1 if the job has been requeued too often or Slurm would
    not accept it.

    Raises:
        ValueError: an invalid configuration, data or allocation.
    """
    run = Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
    job = allocation()
    ranks = config.ranks
    if ranks is None:
        ranks = job.tasks if job else max(simulated_ranks(), fewest_ranks(run))
    run, ignored = reset_unused(run, ranks)
    nodes, chosen, left_out = _lay_out(run, ranks, job)
    if chosen:
        run, ranks = chosen.config, chosen.layout.world
        job = job and dataclasses.replace(job, nodes=nodes)
        ignored = [*ignored, *([left_out] if left_out else [])]
    rules.check(run, ranks)
    layout = Layout.of(run.parallel, ranks)
    shape = Shape.of(run.cluster, ranks) if slurm is not None else None
    if in_job:
        assert job is not None
        job.check(ranks)
        if restarts() > run.slurm.max_requeues:
            _say(f"this job has been requeued {restarts()} times, more than slurm.max_requeues allows: it ends here")
            return FAILED
    run_dir = open_run_dir(run) if in_job else None
    with Console(stream=sys.stderr if in_job else None, may_lose_output=in_job) as console:
        prepared = prepare_run(run, run_dir, console)
        tokens = sum(source.num_tokens for source in prepared.train)
        if run.checkpoint.load and not in_job and not checkpoint_dirs(expected_path(run)):
            _check_files(run.checkpoint.load)
        table, warnings = summarize_run(run, layout, tokens)
        if run.data.kind == "blend":
            from corpus.open_data import blend_row

            table += blend_row(prepared, run)
        console.start_table([*table, *([("layout", "parallel=auto", chosen.why)] if chosen else [])])
        if ranks > 1:
            console.note(describe(layout, _ranks_per_node(run, ranks, job)) + "\n")
        for note in prepared.notes:
            console.note(note)
        for warning in [*ignored, *warnings, *(job.notes(ranks) if in_job and job else [])]:
            console.warning(warning)
    if run_dir:
        forget_stop(run_dir.path)
        _begin(run_dir.path, nodes, layout, chosen)
    return _ask(shape, slurm, elastic=chosen is not None) if shape and slurm is not None else 0


def _lay_out(run: Config, ranks: int, job: Allocation | None) -> tuple[int, Choice | None, str | None]:
    """(number of nodes that are used, the layout with parallel=auto, a warning if nodes are left out)."""
    if not run.parallel.auto:
        return (job.nodes if job else 1), None, None
    if job and ranks % job.nodes == 0:
        return choose_nodes(run, job.nodes, ranks // job.nodes)
    return (job.nodes if job else 1), choose(run, ranks, _ranks_per_node(run, ranks, job)), None


def _begin(run_dir: Path, nodes: int, layout: Layout, chosen: Choice | None) -> None:
    """Records the attempt, and prints what launch/job.sh needs: nodes, tasks, chosen settings, run directory."""
    settings = chosen.settings if chosen else {}
    names = os.environ.get("SWITCHYARD_NODES", "").split()[:nodes]
    start = Start(attempt_id(), names, layout.world, layout.describe(), settings)
    with contextlib.suppress(OSError):  # as at its end
        record_start(run_dir, start, os.environ.get("SWITCHYARD_DOWN_NODES", "").split())
    print(nodes, layout.world, json.dumps(settings, separators=(",", ":")), run_dir)


def _check_files(load: str) -> None:
    """Reads the whole checkpoint, as the run does when it starts. Raises ValueError if a file is damaged."""
    redirection = redirect_output(0)
    try:
        from parallel import checkpoint  # imports PyTorch and Megatron-Core

        checkpoint.resolve(load)
    finally:
        redirection.undo()


def _ranks_per_node(config: Config, ranks: int, job: Allocation | None) -> int:
    if job:
        return math.ceil(ranks / job.nodes)
    return config.cluster.ranks_per_node if config.cluster.name else ranks


def fewest_ranks(config: Config) -> int:
    """The smallest world size that fits the layout of the dense layers and that of the experts."""
    p = config.parallel
    experts = p.etp * p.ep * p.pp if config.model.moe.num_experts else 1
    return math.lcm(p.tp * p.pp * p.cp, experts)


def _ask(shape: Shape, options: str, *, elastic: bool) -> int:
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("ranks=")]
    words = sbatch_command(shape, shlex.split(options), overrides, elastic=elastic)
    print(shlex.join(words))
    taken, answer = ask_slurm(words)
    print(answer)
    return 0 if taken else FAILED


def _say(message: str) -> None:
    print(f"switchyard: {visible(message)}", file=sys.stderr)


def _flags(arguments: list[str]) -> tuple[dict[str, object], list[str]]:
    """The flags of this command, and the remaining arguments for Hydra."""
    flags: dict[str, object] = {}
    rest = []
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "--slurm":
            flags["slurm"] = value
        elif word == "--job":
            flags["in_job"] = True
        else:
            rest.append(word)
    return flags, rest


if __name__ == "__main__":
    flags, sys.argv[1:] = _flags(sys.argv[1:])
    command(CheckConfig, "config", functools.partial(main, **flags))
