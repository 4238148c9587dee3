"""The life of one rank of a training run."""

import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from conf.schema import Config
from corpus.prepare import Prepared
from parallel.simulate import RankPool
from parallel.world import World
from training import environment, lookahead
from training.console import Console
from training.guard import STOP_SIGNALS, RunFailed, StopRequest, TakenOver
from training.lives import BAD_CONFIGURATION, DONE, FAILED, life_name, write_stop
from training.noise import NoiseRedirection, redirect_noise
from training.run_dir import RunDir, expected_path, open_run_dir

if TYPE_CHECKING:
    from training.loop import Trainer
    from training.session import Session

PRELOAD = ("parallel.preload", "training.rank", "training.loop", "launch.cli")
"""What the fork server of simulated ranks imports before the first fork."""


def train_rank(
    world: World,
    config: Config,
    run_dir: RunDir | None,
    prepared: Prepared,
    noise: NoiseRedirection | None = None,
    early: StopRequest | None = None,
) -> int:
    """Trains as one rank and returns the exit code.

    Args:
        run_dir: adopted; None when several processes were started by a launcher: rank 0 then opens it for all.
        noise: what already keeps the engine's output off the screen; None: this call takes care of it.
        early: what remembers signals while the engine is being imported.

    Raises:
        ValueError: what the user can mend (a run directory of another model).
        OSError: a file that cannot be read or written.
    """
    own_noise = redirect_noise(world.rank) if noise is None else None
    noise = noise or own_noise
    assert noise is not None
    try:
        # Here, after the redirection: importing the engine prints warnings.
        from parallel import cpu

        cpu.megatron()
        from parallel.watch import Watch
        from training import expert_backend
        from training import session as sessions
        from training.loop import Trainer

        session = sessions.start(config, world, train=True, run_dir=run_dir.path if run_dir else expected_path(config))
        try:
            run_dir = run_dir or _agree_on_run_dir(world, config, prepared)
            log = run_dir.path / "train.log"
            noise.attach(log)
            with Console(rank=world.rank, log_path=log) as console:
                if world.rank == 0:
                    _announce(console, session, run_dir, prepared)
                trainer = Trainer(session, run_dir, prepared, console)
                if world.rank == 0:
                    with trainer.storage.noted():
                        expert_backend.remember(config, run_dir.path, session.backend)
                        environment.record(run_dir.path)
                request = StopRequest(received=early.received if early else None)
                with Watch(world, config.runtime.timeout, trainer.signs_of_life), request as stop:
                    trainer.restore()
                    return _train(trainer, stop)
        finally:
            sessions.stop()
    except RunFailed as failure:  # before training
        if world.rank == 0:
            print(f"switchyard: error: {failure}", file=sys.stderr)
            tell_batch_script(config, FAILED, str(failure))
        return FAILED
    except OSError:
        logging.getLogger("switchyard").exception("this rank ends")
        raise
    finally:
        if own_noise:
            own_noise.undo()


def _train(trainer: "Trainer", stop: StopRequest) -> int:
    """Runs to an end and writes down what it was. Returns the exit code."""
    import torch.distributed as dist

    try:
        code = trainer.run(stop)
        reason = "all steps are taken" if code == DONE else stop.reason
    except TakenOver as lost:
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


def _announce(console: Console, session: "Session", run_dir: RunDir, prepared: Prepared) -> None:
    tokens = sum(source.num_tokens for source in prepared.train)
    held_out = sum(source.num_tokens for source in prepared.valid)
    data = ("data", f"{tokens / 1e6:.2f} M tokens to train on", f"{held_out / 1e6:.2f} M held out")
    job = [("job", life_name(), f"on {os.environ.get('SLURM_JOB_NODELIST')}")] if life_name() else []
    run = ("run", str(run_dir.path), "continued" if run_dir.continued else "new")
    shown = None if session.config.runtime.verbose else _SHOWN | session.refused
    console.start_table([*session.table, data, *job, run], shown)
    if warning := lookahead.warning(session.config.model):
        console.warning(warning)
    for note in prepared.notes:
        console.note(note)
    if run_dir.changed:
        console.warning(f"settings differ from the earlier life of this run: {'; '.join(run_dir.changed)}")


def _outcome(
    world: World, config: Config, run_dir: RunDir, prepared: Prepared, received: str | None
) -> tuple[int, str]:
    """train_rank for a simulated rank: (exit code, message)."""
    try:
        return train_rank(world, config, run_dir, prepared, early=StopRequest(received=received)), ""
    except ValueError as error:
        return BAD_CONFIGURATION, str(error)


def train_simulated(
    ranks: int, config: Config, run_dir: RunDir, prepared: Prepared, received: str | None = None
) -> int:
    """Trains as N ranks on this machine and returns the exit code. Signals that ask for an end go to every rank.

    Args:
        received: a signal that asked for an end before this call.

    Raises:
        ValueError: as train_rank.
        RankFailed: a rank raised anything else, or died.
    """
    with RankPool(ranks, preload=PRELOAD) as pool:

        def forward(number: int, frame: FrameType | None) -> None:
            pool.signal(number)

        previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
        try:
            outcomes = pool.run(ranks, _outcome, config, run_dir, prepared, received)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    code, message = next((o for o in outcomes if o[0]), (0, ""))
    if message:
        raise ValueError(message)
    return code
