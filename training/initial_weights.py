"""Checks `checkpoint.load`, the weights that a run starts from, before data are prepared or anything is written."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from conf.extensions import yields_documents
from conf.override_text import setting
from conf.schema import Config, DataConfig
from corpus.paths import nearest_existing
from corpus.tokenizer_files import tokenizer_json
from training.adapters import as_base, check_base
from training.compatibility import describe_changes, model_differences, overrides_to_restore
from training.run_dir import TOKENIZER, RunDir, checkpoint_dirs, expected_path, read_settings
from training.run_files import json_object


@dataclass(frozen=True)
class Source:
    """The checkpoint that the weights are loaded from."""

    run_dir: Path
    directory: Path
    """The newest checkpoint, or the one that was specified."""

    @property
    def tokenizer(self) -> Path | None:
        path = self.run_dir / TOKENIZER
        return path if path.exists() else None


def data_settings(config: Config, run_dir: RunDir | None) -> DataConfig:
    """The data settings of a run, with the tokenizer of the weights that it starts from.

    Args:
        run_dir: None if it is not opened yet, or not by this process.

    Raises:
        ValueError: checkpoint.load has no checkpoint, or one of another model or with another tokenizer.
    """
    if not config.checkpoint.load:
        if config.lora.rank is not None:
            raise ValueError(
                f"lora.rank={config.lora.rank} needs checkpoint.load, the run whose weights the adapters are trained "
                "for; it is null: set it to a run directory, or lora.rank=null to train all weights"
            )
        return config.data
    path = run_dir.path if run_dir else expected_path(config)
    if config.lora.rank is not None:
        source = find_source(config.checkpoint.load)
        as_base(source.directory)
        if steps := checkpoint_dirs(path):
            check_base(config.checkpoint.load, source.directory, steps[-1])
    if checkpoint_dirs(path):  # the run resumes from its own checkpoint; the source may not exist any more
        kept = path / TOKENIZER
        return _with_tokenizer(config.data, kept if kept.exists() else None)
    source = find_source(config.checkpoint.load)
    check_model(config, source)
    if "data.tokenizer" in config.checkpoint.load_except:
        return config.data
    check_tokenizer(config.data, source)
    return _with_tokenizer(config.data, source.tokenizer)


def find_source(load: str) -> Source:
    """The checkpoint that `checkpoint.load` means. Checks that its files have their full sizes; the ranks verify their
    content later.

    Raises:
        ValueError: there is none.
    """
    given = Path(load).expanduser()
    if given.name.startswith("step_"):
        found = [given]
    else:
        found = checkpoint_dirs(given.parent if given.name == "checkpoints" else given)[::-1]
    for directory in found:
        if _is_complete(directory):
            return Source(directory.absolute().parent.parent, directory)
    what = f"only incomplete ones ({', '.join(p.name for p in found)})" if found else "no checkpoint"
    hint = "" if given.exists() else nearest_existing(str(given))
    raise ValueError(
        f"checkpoint.load={load}: found {what}; a run directory or one of its step_NNNNNNNN is needed{hint}"
    )


def _is_complete(directory: Path) -> bool:
    """Whether every file of the manifest exists in its full size."""
    path = directory / "manifest.json"
    try:
        manifest = json_object(path.read_bytes()) if path.is_file() else None  # reading a named pipe would block
        if manifest is None:
            return False
        files = manifest.get("files", {}).items()
        return all((directory / name).stat().st_size == size for name, (size, *_) in files)
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def check_model(config: Config, source: Source) -> None:
    """Compares the settings of the model with those of the source.

    Raises:
        ValueError: they differ in settings that are not in checkpoint.load_except.
    """
    try:
        settings = read_settings(source.run_dir)
    except ValueError as error:
        raise ValueError(f"checkpoint.load={config.checkpoint.load}: the settings of its model: {error}") from None
    changes = model_differences(settings, dataclasses.asdict(config))
    named = config.checkpoint.load_except
    fatal = {key: change for key, change in changes.items() if key not in named}
    if fatal:
        raise ValueError(
            f"checkpoint.load={config.checkpoint.load} is of another model ({describe_changes(fatal)}). "
            f"Take its settings ({overrides_to_restore(fatal)}), or name what may differ: "
            f"checkpoint.load_except=[{','.join([*named, *fatal])}]"
        )


def check_tokenizer(data: DataConfig, source: Source) -> None:
    """Raises ValueError if text would be tokenized differently from the data that the weights were trained on."""
    kept = source.tokenizer
    if kept is None:
        if data.tokenizer is None and yields_documents(data.kind):
            raise ValueError(
                f"checkpoint.load: {source.run_dir} has no {TOKENIZER}, and a new one would give its token ids another "
                "meaning: set data.tokenizer to the one that made its token files, or "
                "checkpoint.load_except=[data.tokenizer] to train a new one"
            )
        return
    if data.tokenizer is None:
        return
    given = Path(tokenizer_json(data.tokenizer, "data.tokenizer"))
    if given.read_bytes() != kept.read_bytes():
        raise ValueError(
            f"data.tokenizer={data.tokenizer} is not the one of checkpoint.load: its token ids mean other text. "
            f"Leave it out, or set {setting('data.tokenizer', str(kept))}; deliberately: "
            "checkpoint.load_except=[data.tokenizer]"
        )


def _with_tokenizer(data: DataConfig, tokenizer: Path | None) -> DataConfig:
    if data.tokenizer is not None or tokenizer is None:
        return data
    return dataclasses.replace(data, tokenizer=str(tokenizer))
