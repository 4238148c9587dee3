"""`python -m launch.evaluate checkpoint=DIR [data.files=[...]]`: held-out loss, perplexity and bits per byte."""

from dataclasses import replace
from pathlib import Path

from conf.commands import EvaluateConfig
from conf.schema import DataConfig
from corpus.prepare import Prepared, prepare
from launch.cli import command
from parallel.env import World
from training import noncausal
from training.console import Console
from training.load_checkpoint import LoadedModel, load_model, on_every_rank
from training.run_dir import TOKENIZER


def main(config: EvaluateConfig) -> int:
    """Prints loss, perplexity and bits per byte of the run's held-out text, or of the given files. Returns exit code 0.

    Raises:
        ValueError: no such checkpoint, unreadable text, or an invalid layout.
    """
    return on_every_rank(evaluate_rank, config)


def evaluate_rank(world: World, config: EvaluateConfig) -> int:
    """`main` on one rank; rank 0 prints."""
    with load_model(config.checkpoint, config, world) as loaded, Console(rank=world.rank) as console:
        from corpus.stream import ValidWindows
        from training.evaluate import evaluate
        from training.router_replay import ReplayedWindows, RoutingRecording

        data = _data(config, loaded)
        prepared = _prepare(data, loaded, own_text=bool(config.data.files), console=console)
        run = loaded.built.config
        windows = ValidWindows(
            prepared, sequence_length=run.train.sequence_length, document_mask=run.data.document_mask
        )
        lengths = loaded.tokenizer.byte_lengths() if loaded.tokenizer else None
        recording = None
        if config.record_routing:
            recording = RoutingRecording(loaded.built, weights=config.record_routing_weights)
        text = ReplayedWindows(windows, Path(config.replay_routing), loaded.built) if config.replay_routing else windows
        result = evaluate(loaded.built, text, lengths, batches=config.batches, recording=recording)
        if recording and config.record_routing:
            recording.save(Path(config.record_routing), windows)
        console.note(f"{loaded.directory}: {result.tokens:,} tokens of {_what(config)}")
        if warning := noncausal.warning(run.model):
            console.warning(warning)
        for note in prepared.notes:
            console.note(note)
        console.held_out(result.row(loaded.step), prepared.gzip_bits_per_byte())
    return 0


def _data(config: EvaluateConfig, loaded: LoadedModel) -> DataConfig:
    kept = loaded.run_dir / TOKENIZER
    recorded = loaded.built.config.data
    data = replace(
        recorded,
        tokenizer=str(kept) if kept.exists() else None,
        cache_dir=config.data.cache_dir or recorded.cache_dir,
    )
    if not config.data.files:
        return data
    if loaded.tokenizer is None:
        raise ValueError(f"data.files: {loaded.run_dir} has no {TOKENIZER}, so that text cannot be tokenised")
    own = replace(data, kind="text", files=config.data.files, text_key=config.data.text_key, valid_files=[], blend=[])
    return own


def _prepare(data: DataConfig, loaded: LoadedModel, *, own_text: bool, console: Console) -> Prepared:
    run = loaded.built.config
    return prepare(
        data,
        vocab_size=run.model.vocab_size,
        sequence_length=run.train.sequence_length,
        progress=console.progress,
        held_out_only=own_text,
    )


def _what(config: EvaluateConfig) -> str:
    return ", ".join(config.data.files) if config.data.files else "the run's held-out text"


if __name__ == "__main__":
    command(EvaluateConfig, "evaluate", main)
