"""`python -m launch.evaluate checkpoint=DIR [data.files=[...]]`: held-out loss, perplexity and bits per byte;
`tasks=[...]`: results on evaluation tasks of lm-eval instead (docs/guides/evaluation.md)."""

from dataclasses import fields, replace
from pathlib import Path

from conf.commands import EvaluateConfig
from conf.config_view import format_value
from conf.eval_rules import check_installed
from conf.eval_schema import TaskSettings
from conf.preference_schema import sequences_per_prompt
from conf.schema import DataConfig
from corpus.documents import expand, has_rows
from corpus.prepare import Prepared, prepare
from launch.cli import command
from launch.generate import check_given_file, check_new_file
from parallel.env import World
from training import noncausal
from training.console import Console
from training.load_checkpoint import LoadedModel, load_model, on_every_rank
from training.run_dir import TOKENIZER


def main(config: EvaluateConfig) -> int:
    """Prints loss, perplexity and bits per byte of the run's held-out text, or of the given files, or the results on
    tasks. Returns exit code 0.

    Raises:
        ValueError: no such checkpoint, unreadable text, an invalid layout, settings that do not fit together, or tasks
            that are not there.
    """
    _check(config)
    return on_every_rank(tasks_rank if config.tasks else evaluate_rank, config)


def _check(config: EvaluateConfig) -> None:
    """Raises ValueError for settings that would be ignored or are out of bounds."""
    if config.tasks:
        check_installed()
    defaults = EvaluateConfig(checkpoint=config.checkpoint)
    of_tasks = [field.name for field in fields(TaskSettings) if field.name != "tasks"] + ["output", "log_samples"]
    of_text = ["batches", "record_routing", "record_routing_weights", "replay_routing", "data"]
    needs = "tasks=[...]" if not config.tasks else "held-out text: tasks=[]"
    for name in of_text if config.tasks else of_tasks:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"{name} needs {needs}, and would be ignored")
    if config.batches is not None and config.batches < 1:
        raise ValueError(f"batches={config.batches} must be >= 1, or null for all of the text")
    if config.record_routing_weights and not config.record_routing:
        raise ValueError("record_routing_weights needs record_routing, and would be ignored")
    for name in ("output", "record_routing"):
        if path := getattr(config, name):
            check_new_file(name, path)
    if config.replay_routing:
        check_given_file("replay_routing", config.replay_routing)
    for field in fields(TaskSettings):
        bounds, value = field.metadata.get("bounds"), getattr(config, field.name)
        if bounds is not None and value is not None and not bounds.contain(value):
            nearest = bounds.nearest(field.default)
            raise ValueError(f"{field.name} {bounds}, but it is {value}; nearest: {format_value(nearest)}")


def tasks_rank(world: World, config: EvaluateConfig) -> int:
    """`main` on one rank, with tasks; rank 0 prints."""
    with load_model(config.checkpoint, config, world) as loaded, Console(rank=world.rank) as console:
        from training.eval_tasks import EvalTasks, table, write_results

        tasks = EvalTasks(config, loaded.built, loaded.run_dir, log_samples=config.log_samples)
        console.note(f"{loaded.directory}: {', '.join(config.tasks)}")
        if results := tasks.run():
            print(table(results))
            for path in write_results(results, loaded.run_dir, loaded.step, config.output):
                console.note(f"results: {path}")
    return 0


def evaluate_rank(world: World, config: EvaluateConfig) -> int:
    """`main` on one rank; rank 0 prints."""
    with load_model(config.checkpoint, config, world) as loaded, Console(rank=world.rank) as console:
        from corpus.open_data import held_out_samples
        from training.evaluate import evaluate
        from training.router_replay import ReplayedWindows, RoutingRecording

        data = _data(config, loaded)
        if data.kind == "preference":
            if name := next((name for name in ("record_routing", "replay_routing") if getattr(config, name)), None):
                raise ValueError(f"{name} needs held-out text, and the run has preferences: give data.files=[FILE]")
            return _evaluate_preferences(config, loaded, data, console)
        noncausal.check_predicts_tokens(loaded.built.config.model)
        prepared = _prepare(data, loaded, own_text=bool(config.data.files), console=console)
        run = loaded.built.config
        windows = held_out_samples(prepared, data, sequence_length=run.train.sequence_length)
        lengths = loaded.tokenizer.byte_lengths() if loaded.tokenizer else None
        recording = None
        if config.record_routing:
            recording = RoutingRecording(loaded.built, weights=config.record_routing_weights)
        replayed = config.replay_routing and Path(config.replay_routing).expanduser()
        text = ReplayedWindows(windows, replayed, loaded.built) if replayed else windows
        result = evaluate(loaded.built, text, lengths, batches=config.batches, recording=recording)
        if recording and config.record_routing:
            recording.save(Path(config.record_routing).expanduser(), windows)
        console.note(f"{loaded.directory}: {result.tokens:,.10g} tokens of {_what(config)}")
        if warning := noncausal.warning(run.model):
            console.warning(warning)
        for note in prepared.notes:
            console.note(note)
        console.held_out(result.row(loaded.step), prepared.gzip_bits_per_byte())
    return 0


def _evaluate_preferences(config: EvaluateConfig, loaded: LoadedModel, data: DataConfig, console: Console) -> int:
    """The run's objective on its held-out preferences."""
    from training.preferences import evaluate_held_out

    run = loaded.built.config
    prepared = prepare(
        data,
        vocab_size=run.model.vocab_size,
        sequence_length=run.train.sequence_length,
        progress=console.progress,
        max_responses=sequences_per_prompt(run.train.objective, run.preference),
    )
    result = evaluate_held_out(loaded.built, prepared, loaded.run_dir, batches=config.batches)
    console.note(f"{loaded.directory}: {result.tokens:,} prompts of the run's held-out preferences")
    console.held_out(result.row(loaded.step), None)
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
    # Of a run on conversations, files with rows are conversations as well.
    kind = "chat" if data.kind == "chat" and all(map(has_rows, expand(config.data.files))) else "text"
    own = replace(data, kind=kind, files=config.data.files, text_key=config.data.text_key, valid_files=[], blend=[])
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
