"""`python -m launch.score checkpoint=DIR input=FILE output=FILE`: rewards of conversations under a reward model, or an
ensemble of them (checkpoint=[A,B,C])."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conf.score_config import ScoreConfig
from corpus import storage
from corpus.documents import Row, has_rows, read_rows, row_formats
from launch.cli import command
from launch.generate import check_given_file, check_new_file
from parallel.env import World
from training.console import Console
from training.load_checkpoint import load_model, on_every_rank
from training.run_files import write_atomically


def main(config: ScoreConfig) -> int:
    """Writes the rewards. Returns exit code 0.

    Raises:
        ValueError: no such checkpoint, one that is no reward model, rows that are no conversations, or a conversation
            that is longer than the model's sequences.
    """
    if not checkpoints(config):
        raise ValueError("checkpoint=[] names no reward model")
    if not storage.is_url(config.input):
        check_given_file("input", config.input)
    if not has_rows(config.input) or not storage.is_file(config.input):
        raise ValueError(f"input={config.input} is not a file with one of the suffixes {row_formats()}")
    if not config.output.endswith(".jsonl"):
        raise ValueError(f"output={config.output} must be a new file with the suffix .jsonl")
    check_new_file("output", config.output)
    if not 0 <= config.deviations < float("inf"):
        raise ValueError(f"deviations={config.deviations} must be >= 0")
    return on_every_rank(score_rank, config)


def checkpoints(config: ScoreConfig) -> list[str]:
    """Raises ValueError if they are neither a path nor a list of paths."""
    given = config.checkpoint if isinstance(config.checkpoint, list) else [config.checkpoint]
    if wrong := [path for path in given if not isinstance(path, str | int | float) or isinstance(path, bool)]:
        raise ValueError(f"checkpoint={wrong[0]} is not a run directory; of an ensemble give [A,B]")
    return [str(path) for path in given]


def score_rank(world: World, config: ScoreConfig) -> int:
    """`main` on one rank; rank 0 writes."""
    rows = list(read_rows(config.input))
    if not rows:
        raise ValueError(f"input={config.input} has no rows")
    of_models = []
    for path in checkpoints(config):
        with load_model(path, config, world) as loaded:
            from training.rewards import rewards_of

            of_models.append(rewards_of(loaded, config.input, rows))
    if world.rank == 0:
        lines = "".join(scored(rows, np.stack(of_models), config.deviations))
        write_atomically(Path(config.output).expanduser(), lines.encode())
        with Console(rank=0) as console:
            console.note(f"{len(rows):,} rewards in {config.output}")
    return 0


def scored(rows: Sequence[Row], rewards_MN: np.ndarray, deviations: float) -> list[str]:
    """The rows as lines of JSON with their reward.

    Args:
        rewards_MN: of M models, for N rows.
    """
    mean_N, std_N = rewards_MN.mean(0), rewards_MN.std(0)
    lines = []
    for n, row in enumerate(rows):
        fields = {"reward": float(mean_N[n] - deviations * std_N[n])}
        if len(rewards_MN) > 1:
            fields |= {"reward_mean": float(mean_N[n]), "reward_std": float(std_N[n])}
            fields["rewards"] = rewards_MN[:, n].tolist()
        assert isinstance(row.value, dict)  # rewards_of has refused others
        lines.append(json.dumps(row.value | fields, default=str) + "\n")
    return lines


if __name__ == "__main__":
    command(ScoreConfig, "score", main)
