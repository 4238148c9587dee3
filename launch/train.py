"""`python -m launch.train [overrides]`: trains a model. Users run `bash launch/train.sh`."""
# ruff: noqa: E402

import os

from training.signals import EndedEarly, StopRequest

STOP = StopRequest(is_main_process=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0")
if __name__ == "__main__":
    STOP.__enter__()  # before the imports, which take a second

import functools
import sys
from collections.abc import Sequence

from conf import rules
from conf.preference_schema import sequences_per_prompt
from conf.printable import visible
from conf.schema import Config
from corpus.blend_epochs import with_quotas
from corpus.prepare import Prepared, prepare
from launch.cli import command
from parallel.env import World, should_print, started_ranks
from parallel.local_launcher import RankFailed
from parallel.node_sharing import NodeFailure, node_key, once_per_node
from training.console import Console
from training.errors import RankError
from training.frozen import frozen_parameters
from training.initial_weights import data_settings
from training.output_redirect import redirect_output
from training.planner import auto
from training.requeue import BAD_CONFIGURATION, DONE, FAILED, STOPPED
from training.run_dir import RunDir, open_run_dir
from training.sweep import reset_unused
from training.worker import tell_batch_script, train_rank, train_simulated


def main(config: Config, stop: StopRequest) -> int:
    """Validates the configuration, then trains: as a rank of a torchrun or Slurm job, as N simulated ranks (NPROC=N) or
    in this process alone. Returns the exit code. A signal before the first step ends a process that no other rank
    waits for.

    Raises:
        ValueError: an invalid configuration or data, before any rank is started.
    """
    world, simulated = started_ranks()
    config, warnings = reset_unused(config, max(world.size, simulated))
    config = auto.resolve(config, max(world.size, simulated), max(world.local_size, simulated))
    rules.check(config, max(world.size, simulated))
    frozen_parameters(config)
    # srun kills a step in which a task exits with a code other than 0; stop.json records how the run ended.
    in_step = world.size > 1 and "SLURM_STEP_ID" in os.environ
    try:
        code = _train(world, simulated, config, stop, warnings)
    except EndedEarly:
        tell_batch_script(config, STOPPED, stop.reason)
        stop.end_early(DONE if in_step else None)
    except (RankError, RankFailed) as error:
        message = str(error)
        if should_print(world, message):
            print(f"switchyard: error: {visible(message)}", file=sys.stderr)
        return FAILED
    except NodeFailure as failure:
        if world.local_rank <= 1:  # 0 has printed its own failure, unless it was killed
            print(f"switchyard: error: {visible(str(failure))}", file=sys.stderr)
        return FAILED
    except ValueError as error:
        # An error that only the rank itself can detect, such as a GPU without bf16.
        tell_batch_script(config, BAD_CONFIGURATION, str(error))
        raise
    return DONE if code == STOPPED and in_step else code


def _train(world: World, simulated: int, config: Config, stop: StopRequest, warnings: Sequence[str]) -> int:
    run_dir, redirection = None, redirect_output(world.rank)

    def last_act() -> None:
        if run_dir:
            run_dir.discard()
        tell_batch_script(config, STOPPED, stop.reason)

    try:
        with Console(rank=world.rank, may_lose_output=True) as console, stop.preparing(last_act):
            for warning in warnings:
                console.warning(warning)
            run_dir = open_run_dir(config) if world.size == 1 else None
            prepared = _prepare_on_node(world, config, run_dir, console, stop)
        if simulated == 1:
            return train_rank(world, config, run_dir, prepared, redirection, stop)
    finally:
        redirection.undo()
    assert run_dir is not None
    return train_simulated(simulated, config, run_dir, prepared, stop)


def _prepare_on_node(
    world: World, config: Config, run_dir: RunDir | None, console: Console, stop: StopRequest
) -> Prepared:
    """As `prepare_run`, which one process of a node calls for all of its ranks. Nodes that share a cache wait for each
    other there.

    Raises:
        NodeFailure: that process failed.
    """
    key = node_key() if world.size > 1 else None
    if key is None:
        return prepare_run(config, run_dir, console, stop)

    def waiting(what: str) -> None:
        stop.check()
        console.progress(what, 0.0)

    def work() -> str:
        prepared = prepare_run(config, None, console, stop)
        if config.data.kind not in ("chat", "preference"):  # small, and packed by each start
            from corpus.open_data import index_first_epoch

            sizes = {"sequence_length": config.train.sequence_length, "seed": config.train.seed}
            index_first_epoch(prepared, config.data, **sizes)
        return prepared.to_json()

    return Prepared.from_json(once_per_node(world, key, work, timeout=config.runtime.timeout, waiting=waiting))


def prepare_run(config: Config, run_dir: RunDir | None, console: Console, stop: StopRequest | None = None) -> Prepared:
    """Prepares the data, then writes the configuration to the run directory.

    Raises:
        EndedEarly: `stop` was requested. A run directory that was created for this run is removed, unless another run
            uses it.
        ValueError: invalid data, or checkpoint.load is of another model. The run directory is removed as well.
    """

    def progress(what: str, done: float) -> None:
        if stop:
            stop.check()
        console.progress(what, done)

    try:
        prepared = prepare(
            data_settings(config, run_dir),
            vocab_size=config.model.vocab_size,
            sequence_length=config.train.sequence_length,
            progress=progress,
            timeout=config.runtime.timeout,
            max_responses=sequences_per_prompt(config.train.objective, config.preference),
        )
        prepared = with_quotas(prepared, config)
        if run_dir:
            run_dir.adopt(config, prepared.tokenizer)
        return prepared
    except BaseException:
        if run_dir:
            run_dir.discard()
        raise


if __name__ == "__main__":
    command(Config, "config", functools.partial(main, stop=STOP))
