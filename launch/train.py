"""`python -m launch.train [overrides]`: trains. `bash launch/train.sh` is the way in for people."""

import os
import signal

from conf import rules
from conf.schema import Config
from corpus.prepare import Prepared, prepare
from launch.cli import command
from parallel.world import World, simulated_ranks
from training.console import Console
from training.guard import StopRequest
from training.initial_weights import data_settings
from training.lives import BAD_CONFIGURATION, DONE, STOPPED
from training.noise import redirect_noise
from training.rank import tell_batch_script, train_rank, train_simulated
from training.run_dir import RunDir, open_run_dir


def main(config: Config) -> int:
    """Checks everything that can be checked, then trains: as a rank of a torchrun or Slurm job, as N simulated ranks
    (NPROC=N), or alone in this process. Returns the exit code.

    Raises:
        ValueError: a configuration or data that cannot work; no rank has started then.
    """
    world, simulated = World.from_environment(), simulated_ranks()
    if simulated > 1 and world.size > 1:
        raise ValueError(f"NPROC={simulated} simulates ranks inside one task, but there are {world.size}; unset NPROC")
    rules.check(config, max(world.size, simulated))
    # Slurm's word that the job's time is nearly up may come while the engine is being imported.
    with StopRequest([signal.SIGUSR1]) as early:
        try:
            code = _train(world, simulated, config, early)
        except ValueError as error:
            # A wrong setting that only the rank itself could see, such as a GPU without bf16.
            tell_batch_script(config, BAD_CONFIGURATION, str(error))
            raise
    # srun kills a step in which a task ends with anything but 0, and says little then: stop.json says how it ended.
    return DONE if code == STOPPED and world.size > 1 and "SLURM_STEP_ID" in os.environ else code


def _train(world: World, simulated: int, config: Config, early: StopRequest) -> int:
    run_dir = open_run_dir(config) if world.size == 1 else None
    noise = redirect_noise(world.rank)
    try:
        with Console(rank=world.rank, may_lose_output=True) as console:
            prepared = prepare_run(config, run_dir, console)
        if simulated == 1:
            return train_rank(world, config, run_dir, prepared, noise, early)
    finally:
        noise.undo()
    assert run_dir is not None
    return train_simulated(simulated, config, run_dir, prepared, early.received)


def prepare_run(config: Config, run_dir: RunDir | None, console: Console) -> Prepared:
    """Prepares the data; the run directory takes the configuration over when the data fits it.

    Raises:
        ValueError: the data is wrong, or checkpoint.load is of another model. A run directory that was made for it is
            gone again, unless another run is in it.
    """
    try:
        prepared = prepare(
            data_settings(config, run_dir),
            vocab_size=config.model.vocab_size,
            sequence_length=config.train.sequence_length,
            progress=console.progress,
        )
        if run_dir:
            run_dir.adopt(config, prepared.tokenizer)
        return prepared
    except BaseException:
        if run_dir:
            run_dir.discard()
        raise


if __name__ == "__main__":
    command(Config, "config", main)
