"""Loads a trained model from a checkpoint, for commands that do not train."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from conf import rules
from conf.commands import InferenceConfig
from conf.extensions import import_extensions
from conf.schema import Config
from corpus.paths import check_exists
from corpus.tokenizer import Tokenizer
from parallel.env import World, started_ranks
from parallel.local_launcher import RankPool
from training.adapters import base_of, found_base
from training.output_redirect import redirect_output
from training.run_dir import TOKENIZER, load_config

if TYPE_CHECKING:  # imports Megatron-Core, which warns: see redirect_output
    from parallel.engine import Engine
    from training.builder import BuiltModel

C = TypeVar("C")


@dataclass(frozen=True)
class LoadedModel:
    built: "BuiltModel"
    run_dir: Path
    directory: Path
    """Of the checkpoint."""
    step: int
    tokenizer: Tokenizer | None
    """None for a run on token files without a tokenizer."""


def on_every_rank(run: Callable[[World, C], int], config: C) -> int:
    """Calls run(world, config) as a rank of a torchrun or Slurm job, on each of N simulated ranks (NPROC=N), or as the
    only rank. Returns the exit code.

    Args:
        run: importable by name; the ranks call it together.

    Raises:
        ValueError: raised by `run`, or the environment of the ranks is wrong.
        RankFailed: a simulated rank raised another exception, or died.
    """
    world, simulated = started_ranks()
    if simulated == 1:
        return run(world, config)
    with RankPool(simulated, preload=("parallel.forkserver_preload", "training.builder", "launch.cli")) as pool:
        outcomes = pool.run(simulated, _outcome, run, config)
    code, message = next((outcome for outcome in outcomes if outcome[0] or outcome[1]), (0, ""))
    if message:
        raise ValueError(message)
    return code


def _outcome(world: World, run: Callable[[World, C], int], config: C) -> tuple[int, str]:
    """(exit code, message) of a simulated rank."""
    try:
        return run(world, config), ""
    except ValueError as error:
        return 0, str(error)


def configured_here(recorded: Config, here: InferenceConfig) -> Config:
    """The configuration of a run, with the layout, precision and runtime settings of this command instead of those of
    training."""
    backend, timeout, threads = here.model.moe.backend, here.runtime.timeout, here.runtime.threads
    moe, runtime = recorded.model.moe, recorded.runtime
    return replace(
        recorded,
        model=replace(recorded.model, moe=replace(moe, backend=moe.backend if backend is None else backend)),
        parallel=here.parallel,
        precision=here.precision,
        extensions=here.extensions,
        runtime=replace(
            runtime,
            timeout=runtime.timeout if timeout is None else timeout,
            threads=runtime.threads if threads is None else threads,
        ),
    )


@contextlib.contextmanager
def load_model(path: str, here: InferenceConfig, world: World | None = None) -> Iterator[LoadedModel]:
    """Context manager that loads the model of a `checkpoint=` setting under any layout.

    Args:
        world: every rank of it calls this together; None: a single process.

    Raises:
        ValueError: there is no complete checkpoint, it is of another version, or a layout or backend is not supported.
    """
    check_exists("checkpoint", path)
    import_extensions(here.extensions)
    world = world or World()
    redirection = redirect_output(world.rank)
    try:
        from parallel import megatron_compat
        from parallel.checkpoint_manifest import find_damage, resolve, resolve_and_load, step_of

        quick = partial(find_damage, but_tensors=True)  # these are verified when they are loaded
        directory = resolve(path, quick)
        _base(directory)
        megatron_compat.load()
        from training import builder

        run_dir = directory.parent.parent
        config = configured_here(load_config(run_dir), here)
        rules.check_layout(config, world.size)
        tokenizer = None
        if (run_dir / TOKENIZER).exists():
            tokenizer = Tokenizer.load(str(run_dir / TOKENIZER), config.data.eod_token)
        built = builder.start(config, world, train=False)
        try:
            directory, _ = resolve_and_load(path, partial(_load_weights, built.engine), quick)
            step = step_of(directory)
            assert step is not None
            yield LoadedModel(built, run_dir, directory, step, tokenizer)
        finally:
            builder.stop()
    finally:
        redirection.undo()


def _base(directory: Path) -> Path | None:
    """Of a checkpoint of adapters, the directory of the weights that they are for."""
    recorded = base_of(directory)
    return found_base(directory, recorded) if recorded else None


def _load_weights(engine: "Engine", directory: Path) -> None:
    from parallel.checkpoint_format import CheckpointDamaged
    from parallel.weight_loading import load_weights

    if (is_adapter := engine.is_adapter) and (base := _base(directory)):
        try:
            load_weights(engine, base, only=lambda name: not is_adapter(name))
        except CheckpointDamaged as error:  # not damage of the adapters
            raise ValueError(f"{base}, which the adapters of {directory} are for, is damaged: {error}") from None
    load_weights(engine, directory, only=is_adapter)
