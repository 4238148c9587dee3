"""`python -m launch.inspect checkpoint=RUN [text=FILE] [compare=RUN] [output=FILE.html]`: a page about a run's router.
It shows loads over training, tokens of a text coloured by expert, each expert's typical tokens, and how experts
relate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.commands import InspectConfig
from corpus.paths import check_exists
from launch.cli import command
from launch.generate import check_folder, check_given_file
from parallel.env import World, started_ranks
from training.load_checkpoint import LoadedModel, load_model
from training.run_dir import TOKENIZER

FEWEST = 2
"""Tokens of a text."""


def main(config: InspectConfig) -> int:
    """Writes the page and prints its path. Returns exit code 0.

    Raises:
        ValueError: no such checkpoint, a dense model, a run without a tokenizer, or an unreadable text.
    """
    world, simulated = started_ranks()
    if world.size > 1 or simulated > 1:
        raise ValueError("launch.inspect runs on one rank, but there are more; nearest: NPROC=1")
    if config.tokens < FEWEST:
        raise ValueError(f"tokens >= {FEWEST}, but it is {config.tokens}; nearest: tokens={FEWEST}")
    if config.output is not None:
        check_folder("output", config.output)
    if config.text is not None:
        check_given_file("text", config.text)
    if config.compare is not None:
        check_exists("compare", config.compare)
    from training.inspection.write import page

    runs = [_run(world, config, path) for path in (config.checkpoint, config.compare) if path]
    output = Path(config.output or f"{Path(config.checkpoint).resolve().name}.html").expanduser()
    output.write_text(page(runs), encoding="utf-8")
    print(output)
    return 0


def _run(world: World, config: InspectConfig, checkpoint: str) -> dict[str, Any]:
    with load_model(checkpoint, config, world) as loaded:
        from training.inspection.collect import collect

        run = loaded.built.config
        if not run.model.sparse_layers:
            raise ValueError(f"{loaded.run_dir} has no sparse layers, and so no router to look at")
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.run_dir} has no tokenizer.json, so that text cannot be tokenised")
        return collect(loaded, _ids(config, loaded), loaded.tokenizer)


def _ids(config: InspectConfig, loaded: LoadedModel) -> list[int]:
    """Tokens of the text, or of the run's held-out text."""
    assert loaded.tokenizer is not None
    if config.text is None:
        return _held_out(loaded, config.tokens)
    try:
        text = Path(config.text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text={config.text} cannot be read: {error}") from error
    ids = loaded.tokenizer.encode(text[: 16 * config.tokens])[: config.tokens]
    if len(ids) < FEWEST:
        raise ValueError(f"text={config.text} has {len(ids)} tokens: give a text with more")
    return ids


def _held_out(loaded: LoadedModel, most: int) -> list[int]:
    from corpus.open_data import held_out_samples
    from corpus.prepare import prepare

    run, kept = loaded.built.config, loaded.run_dir / TOKENIZER
    if run.data.kind == "preference":
        raise ValueError(f"{loaded.run_dir} was trained on preferences and has no held-out text; give text=FILE")
    data = replace(run.data, tokenizer=str(kept) if kept.exists() else None)
    size = run.train.sequence_length
    prepared = prepare(data, vocab_size=run.model.vocab_size, sequence_length=size)
    windows = held_out_samples(prepared, data, sequence_length=size)
    ids: list[int] = []
    for index in range(min(len(windows), -(-most // size))):
        sample = windows.sample(index)
        ids += sample["tokens"][~sample["padding"]].tolist()
    return ids[:most]


if __name__ == "__main__":
    command(InspectConfig, "inspect", main)
