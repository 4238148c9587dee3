"""The life of one rank of a training run."""

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
from training.requeue import BAD_CONFIGURATION, DONE, FAILED, STOPPED, attempt_id, write_stop
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
        run_dir: adopted; None when several processes were started by a launcher: rank 0 then opens it for all.
        redirection: the active redirection of the engine's output; None: this call redirects it.
        stop: what remembers signals already; None: this call sees to it.

    Raises:
        EndedEarly: a signal came before the first step of a rank that nobody waits for.
        RankError: anything that nobody foresaw; its traceback is in train.log.
        ValueError: what the user can mend (a run directory of another model).
        OSError: a file that cannot be read or written, of a rank that is alone.
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
                raise  # a file that cannot be read or written: the command says which
            raise RankError(_summary(world, config, run_dir, redirection, error)) from error


def _summary(
    world: World, config: Config, run_dir: RunDir | None, redirection: OutputRedirection, error: Exception
) -> str:
    """What the screen gets of an error that nobody foresaw; train.log gets the traceback."""
    from parallel.rendezvous import RendezvousError

    if isinstance(error, RendezvousError):
        return str(error)
    log = (run_dir.path if run_dir else expected_path(config)) / "train.log"
    with contextlib.suppress(OSError):
        redirection.attach(log)
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
    # A rank that others wait for agrees with them on an end, before the first step too.
    alone = stop.preparing(lambda: tell_batch_script(config, STOPPED, stop.reason))
    with contextlib.ExitStack() as started:
        with alone if world.size == 1 else contextlib.nullcontext():
            # Here, after the redirection: importing the engine prints warnings.
            from parallel import megatron_compat

            megatron_compat.load()
            from parallel import rendezvous
            from parallel.watchdog import Watchdog
            from training import builder, expert_backend
            from training.trainer import Trainer

            limit, kept_in = config.runtime.timeout, run_dir.path if run_dir else expected_path(config)
            store = rendezvous.join(world, limit) if world.size > 1 else None
            started.callback(builder.stop)
            watch = started.enter_context(Watchdog(world, limit, store=store, expected=(ValueError, RunFailed)))
            built = builder.start(config, world, train=True, run_dir=kept_in, store=store)
        run_dir = run_dir or _agree_on_run_dir(world, config, prepared)
        log = run_dir.path / "train.log"
        redirection.attach(log)
        with Console(rank=world.rank, log_path=log) as console:
            if world.rank == 0:
                _announce(console, built, run_dir, prepared)
            trainer = Trainer(built, run_dir, prepared, console)
            if world.rank == 0:
                with trainer.storage.recording_errors():
                    expert_backend.remember(config, run_dir.path, built.backend)
                    environment.record(run_dir.path)
            watch.follow(trainer.progress_counters)
            trainer.restore()
            return _train(trainer, stop)


def _train(trainer: "Trainer", stop: StopRequest) -> int:
    """Runs to an end and writes down what it was. Returns the exit code."""
    import torch.distributed as dist

    try:
        code = trainer.run(stop)
        reason = "all steps are taken" if code == DONE else stop.reason
    except RunDirTakenOver as lost:
        trainer.console.warning(str(lost))
        # An srun that has outlived its job would have the job's new step of the same number killed for a failure.
        return DONE if "SLURM_STEP_ID" in os.environ else FAILED
    except RunFailed as failure:
        trainer.console.failure(str(failure))
        code, reason = FAILED, str(failure)
    dist.barrier()  # what stop.json says is true of every rank
    if trainer.is_main:
        try:
            write_stop(trainer.run_dir.path, code=code, reason=reason)
        except OSError as error:
            trainer.console.warning(f"the end of the run cannot be written down: {error}")
    return code


def tell_batch_script(config: Config, code: int, reason: str) -> None:
    """Of what ends a rank of a Slurm job before it can train."""
    path = expected_path(config)
    if "SLURM_STEP_ID" in os.environ and path.is_dir():
        with contextlib.suppress(OSError):  # a full disk must not take the place of the message
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


_SHOWN = {"device", "ranks", "preflight", "precision", "FP8 products", "model", "data", "job", "run"}
"""Rows of the start table that are always printed."""


def _announce(console: Console, built: "BuiltModel", run_dir: RunDir, prepared: Prepared) -> None:
    tokens = sum(source.num_tokens for source in prepared.train)
    held_out = sum(source.num_tokens for source in prepared.valid)
    data = ("data", f"{tokens / 1e6:.2f} M tokens to train on", f"{held_out / 1e6:.2f} M held out")
    job = [("job", attempt_id(), f"on {os.environ.get('SLURM_JOB_NODELIST')}")] if attempt_id() else []
    run = ("run", str(run_dir.path), "continued" if run_dir.continued else "new")
    shown = None if built.config.runtime.verbose else _SHOWN | built.refused
    console.start_table([*built.table, data, *job, run], shown)
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
    """Trains as N ranks on this machine and returns the exit code. A signal that asks for an end, also one that came
    before this call, goes to every rank.

    Raises:
        ValueError: as train_rank.
        RankFailed: a rank died, or failed as nobody foresaw.
    """
    with RankPool(ranks, PRELOAD, held_signals=STOP_SIGNALS) as pool, stop.forwarded(pool.signal, pool.kill):
        outcomes = pool.run(ranks, _outcome, config, run_dir, prepared)
    code, message = next((o for o in outcomes if o[0]), (0, ""))
    if message:
        raise ValueError(message)
    return code
