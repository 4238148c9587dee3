"""Runs one rank of a training run, from setup to its exit code."""

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

from conf.printable import visible
from conf.schema import Config
from corpus.prepare import Prepared
from parallel import local_launcher
from parallel.env import World
from parallel.local_launcher import RankPool
from training import environment, noncausal
from training.console import Console
from training.errors import RankError, RunDirTakenOver, RunFailed
from training.output_redirect import OutputRedirection, redirect_output
from training.requeue import (
    BAD_CONFIGURATION,
    DONE,
    FAILED,
    STOPPED,
    attempt_id,
    describe_starts,
    read_starts,
    write_stop,
)
from training.run_dir import RunDir, expected_path, open_run_dir
from training.signals import STOP_SIGNALS, StopRequest

if TYPE_CHECKING:
    from training.builder import BuiltModel
    from training.trainer import Trainer

_LOG = logging.getLogger("switchyard")

PRELOAD = ("parallel.forkserver_preload", "training.worker", "training.trainer", "launch.cli")
"""What the fork server of simulated ranks imports before the first fork."""


def train_rank(
    world: World,
    config: Config,
    run_dir: RunDir | None,
    prepared: Prepared,
    redirection: OutputRedirection | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Trains as one rank and returns the exit code.

    Args:
        run_dir: an initialized run directory; None under a launcher, where rank 0 opens it for all ranks.
        redirection: the active redirection of the engine's output; None: this call redirects it.
        stop: the active handler of signals; None: this call installs one.

    Raises:
        EndedEarly: a signal was received before the first step, in a world of one rank.
        RankError: an unexpected exception; its traceback is in train.log.
        ValueError: an error that the user can fix, such as a run directory of another model.
        OSError: a file cannot be read or written, in a world of one rank.
    """
    with contextlib.ExitStack() as own:
        if redirection is None:
            redirection = redirect_output(world.rank)
            own.callback(redirection.undo)
        stop = stop or own.enter_context(StopRequest(urgent=False))
        try:
            return _train_rank(world, config, run_dir, prepared, redirection, stop)
        except RunFailed as failure:  # before training
            if world.rank == 0:
                print(f"switchyard: error: {visible(str(failure))}", file=sys.stderr)
                tell_batch_script(config, FAILED, str(failure))
            return FAILED
        except ValueError:
            raise
        except Exception as error:
            if world.size == 1 and isinstance(error, OSError):
                _LOG.exception("this rank ends")
                raise  # the command reports the file
            raise RankError(_summary(world, config, run_dir, redirection, error)) from error


def _summary(
    world: World, config: Config, run_dir: RunDir | None, redirection: OutputRedirection, error: Exception
) -> str:
    """The message of an unexpected exception for the terminal; logs the traceback to train.log."""
    from parallel.rendezvous import RendezvousError

    if isinstance(error, RendezvousError):
        return str(error)
    log = (run_dir.path if run_dir else expected_path(config)) / "train.log"
    with contextlib.suppress(OSError):
        redirection.attach(log, on_node=_logs_on_node(world))
    _LOG.error("rank %d failed", world.rank, exc_info=error)
    verdict = getattr(error, "__notes__", None)  # by parallel.watchdog
    if verdict:
        what = verdict[0]
    elif isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        what = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    return what if not log.is_file() else f"{what}; the traceback is in {log}"


def _train_rank(
    world: World,
    config: Config,
    run_dir: RunDir | None,
    prepared: Prepared,
    redirection: OutputRedirection,
    stop: StopRequest,
) -> int:
    # With several ranks, signals before the first step are handled when the ranks agree to stop.
    alone = stop.preparing(lambda: tell_batch_script(config, STOPPED, stop.reason))
    with contextlib.ExitStack() as started:
        with alone if world.size == 1 else contextlib.nullcontext():
            # After the redirection: importing Megatron-Core prints warnings.
            from parallel import megatron_compat

            megatron_compat.load()
            from parallel import rendezvous
            from parallel.watchdog import Watchdog
            from training import builder
            from training.measurements import Measurements
            from training.trainer import Trainer

            limit, kept_in = config.runtime.timeout, run_dir.path if run_dir else expected_path(config)
            store = rendezvous.join(world, limit) if world.size > 1 else None
            started.callback(builder.stop)
            watch = started.enter_context(Watchdog(world, limit, store=store, expected=(ValueError, RunFailed)))
            built = builder.start(config, world, train=True, run_dir=kept_in, store=store)
        run_dir = run_dir or _agree_on_run_dir(world, config, prepared)
        log = run_dir.path / "train.log"
        redirection.attach(log, on_node=_logs_on_node(world))
        watch.dump_crashes_to(redirection.crash_descriptor)
        with Console(rank=world.rank, log_path=log) as console:
            if world.rank == 0:
                _announce(console, built, run_dir, prepared)
            trainer = Trainer(built, run_dir, prepared, console, stop)
            if world.rank == 0:
                with trainer.storage.recording_errors():
                    if built.backend and config.model.moe.backend == "auto":
                        Measurements(config.data.cache_dir, run_dir.path).remember(built.backend)
                    environment.record(run_dir.path)
            watch.follow(trainer.progress_counters)
            trainer.restore()
            return _train(trainer)


def _logs_on_node(world: World) -> bool:
    """Whether this rank logs to a file on its node. On a single node all ranks share train.log."""
    return world.rank != 0 and world.local_size < world.size


def _train(trainer: "Trainer") -> int:
    """Trains and writes stop.json. Returns the exit code."""
    import torch.distributed as dist

    try:
        code = trainer.run()
        reason = "all steps are taken" if code == DONE else trainer.stop.reason
    except RunDirTakenOver as lost:
        trainer.console.warning(str(lost))
        # If an srun that has outlived its job failed, Slurm would kill the job's new step of the same number.
        return DONE if "SLURM_STEP_ID" in os.environ else FAILED
    except RunFailed as failure:
        trainer.console.failure(str(failure))
        code, reason = FAILED, str(failure)
    dist.barrier()  # stop.json must hold for every rank
    if trainer.is_main:
        try:
            write_stop(trainer.run_dir.path, code=code, reason=reason)
        except OSError as error:
            trainer.console.warning(f"cannot write how the run ended: {error}")
    return code


def tell_batch_script(config: Config, code: int, reason: str) -> None:
    """Writes stop.json for an error that ends a rank of a Slurm job before training."""
    path = expected_path(config)
    if "SLURM_STEP_ID" in os.environ and path.is_dir():
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            write_stop(path, code=code, reason=reason)


def _agree_on_run_dir(world: World, config: Config, prepared: Prepared) -> RunDir:
    import torch.distributed as dist

    answer: list[RunDir | str | None] = [None]
    if world.rank == 0:
        try:
            answer[0] = opened = open_run_dir(config)
            try:
                opened.adopt(config, prepared.tokenizer)
            except ValueError:
                opened.discard()
                raise
        except ValueError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    assert isinstance(answer[0], RunDir)
    return answer[0]


_SHOWN = {"device", "ranks", "preflight", "precision", "FP8 products", "model"}
_SHOWN |= {"data", "blend", "job", "attempts", "run"}
"""Rows of the start table that are always printed."""


def _announce(console: Console, built: "BuiltModel", run_dir: RunDir, prepared: Prepared) -> None:
    from corpus.open_data import blend_row

    tokens = sum(source.num_tokens for source in prepared.train)
    held_out = sum(source.num_tokens for source in prepared.valid)
    data = ("data", f"{tokens / 1e6:.2f} M tokens to train on", f"{held_out / 1e6:.2f} M held out")
    job = [("job", attempt_id(), f"on {os.environ.get('SLURM_JOB_NODELIST')}")] if attempt_id() else []
    if job and len(read_starts(run_dir.path)) > 1:
        job += [("attempts", *describe_starts(run_dir.path))]
    run = ("run", str(run_dir.path), "continued" if run_dir.continued else "new")
    shown = None if built.config.runtime.verbose else _SHOWN | built.refused
    console.start_table([*built.table, data, *blend_row(prepared, built.config), *job, run], shown)
    if warning := noncausal.warning(built.config.model):
        console.warning(warning)
    for note in prepared.notes:
        console.note(note)
    if run_dir.changed:
        console.warning(f"settings differ from the previous attempt of this run: {'; '.join(run_dir.changed)}")


def _outcome(world: World, config: Config, run_dir: RunDir, prepared: Prepared) -> tuple[int, str]:
    """train_rank for a simulated rank: (exit code, message)."""
    try:
        return train_rank(world, config, run_dir, prepared), ""
    except ValueError as error:
        return BAD_CONFIGURATION, str(error)
    except RankError as error:
        local_launcher.send_to_parent("diagnosis", str(error))
        return FAILED, ""


def train_simulated(ranks: int, config: Config, run_dir: RunDir, prepared: Prepared, stop: StopRequest) -> int:
    """Trains as N ranks on this machine and returns the exit code. Signals, including one received before this call,
    are forwarded to every rank.

    Raises:
        ValueError: as train_rank.
        RankFailed: a rank died, or failed with an unexpected exception.
    """
    with RankPool(ranks, PRELOAD, held_signals=STOP_SIGNALS) as pool, stop.forwarded(pool.signal, pool.kill):
        outcomes = pool.run(ranks, _outcome, config, run_dir, prepared)
    code, message = next((o for o in outcomes if o[0]), (0, ""))
    if message:
        raise ValueError(message)
    return code
