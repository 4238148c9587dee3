"""Tokenises text files into Megatron token files.

    python -m launch.prepare input=FILES output=PREFIX [tokenizer=tokenizer.json] [vocab_size=4096]

writes PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json, for training with
data=megatron data.files=[PREFIX] data.tokenizer=PREFIX.tokenizer.json

    python -m launch.prepare input=FILES output=FOLDER executor=local workers=8 prepare=web

filters and deduplicates first, as tasks of datatrove on this machine, executor=slurm or executor=ray, and writes a
folder of shards with a manifest, for training with data=megatron data.files=[FOLDER]
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from conf.commands import PrepareConfig
from conf.override_text import command, override
from conf.prepare_rules import check_prepare
from corpus import storage
from corpus.dataset_specs import DatasetSpec
from corpus.documents import expand
from corpus.integrity import sha256, stamp
from corpus.readers.formats import package_versions
from corpus.resumable import resumable_folder
from corpus.shards import TOKENIZER
from corpus.text import MANIFEST, TextCorpus, tokenizer_sample, write_corpus
from corpus.tokenizer_files import tokenizer_json
from launch import cli
from training.console import Console

_OUTPUTS = {"tokenizer.json": ".tokenizer.json", "train.bin": ".bin", "train.idx": ".idx"}


def main(config: PrepareConfig) -> int:
    """Tokenises all documents of `config.input`; returns the exit code 0.

    Raises:
        ValueError: the input cannot be read, the tokenizer does not fit, or the output exists already.
    """
    check_prepare(config)
    patterns = config.input if isinstance(config.input, list) else [config.input]
    files = expand([str(pattern) for pattern in patterns])
    corpus = TextCorpus(DatasetSpec("text", files, weight=1.0, valid_share=0.0), config.text_key, strict=config.strict)
    if config.executor is not None:
        return _at_scale(config, corpus, _check_folder(config.output))
    prefix = _check_output(config.output)
    try:
        manifest = _write(config, corpus, prefix)
    except OSError as error:
        raise ValueError(f"output={config.output} cannot be written: {error.strerror or error}") from error
    counts = manifest["splits"]["train"]
    print(f"{prefix}.bin: {counts['num_tokens']:,} tokens, documents: {counts['num_documents']:,}")
    for note in manifest["notes"]:
        print(note)
    words = [override("data.files", [prefix]), override("data.tokenizer", f"{prefix}.tokenizer.json")]
    print(f"train on it: {command(['data=megatron'], words)}")
    return 0


def _at_scale(config: PrepareConfig, corpus: TextCorpus, folder: Path) -> int:
    from corpus.pipeline.run import prepare_at_scale

    with Console() as console:

        def provide(path: Path) -> None:
            console.progress("training the tokenizer", 0.0)
            _provide_tokenizer(config, corpus, path)
            console.progress("training the tokenizer", 1.0)

        lines = prepare_at_scale(config, corpus.spec.files, folder, provide, console.progress)
    print("\n".join(lines))
    words = [override("data.files", [str(folder)]), override("data.tokenizer", str(folder / TOKENIZER))]
    print(f"train on it: {command(['data=megatron'], words)}")
    return 0


def _check_folder(output: str) -> Path:
    """The absolute path of the output folder, whose parent directory is created."""
    if storage.is_url(output):
        raise ValueError(
            f"output={output}: with executor= the output is a folder that all workers share, not an object; "
            "nearest: a path, whose shards can be copied afterwards"
        )
    folder = Path(output).expanduser().absolute()
    if folder.name in ("", ".."):
        raise ValueError(f"output={output} needs a name for the folder: output={Path(output) / 'corpus'}")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or choose another output")
    return _with_parent(output, folder)


def _write(config: PrepareConfig, corpus: TextCorpus, prefix: str) -> dict[str, Any]:
    """Writes the three files and returns the manifest of the corpus."""
    with _work_folder(config, corpus, prefix) as folder:
        with Console() as console:
            console.progress("training the tokenizer", 0.0)
            _provide_tokenizer(config, corpus, folder / "tokenizer.json")
            console.progress("training the tokenizer", 1.0)
            write_corpus(corpus, str(folder / "tokenizer.json"), config.eod_token, folder, console.progress)
        manifest = json.loads((folder / MANIFEST).read_text())
        if "train" not in manifest["splits"]:
            raise ValueError(f"there is no text in {', '.join(corpus.spec.files)}")
        for name, suffix in _OUTPUTS.items():
            storage.put(folder / name, f"{prefix}{suffix}")
    return manifest


def _work_folder(config: PrepareConfig, corpus: TextCorpus, prefix: str) -> AbstractContextManager[Path]:
    """Nothing incomplete is ever at the output. Beside a local one, on its file system, is what an interrupted command
    left, and the same command continues there."""
    if storage.is_url(prefix):
        return _temporary_folder()
    return resumable_folder(Path(prefix).with_name(f".{Path(prefix).name}.partial"), _identity(config, corpus))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _identity(config: PrepareConfig, corpus: TextCorpus) -> list[Any]:
    """Everything that determines the files, JSON-serialisable."""
    files = [
        [path, storage.version(path) if storage.is_url(path) else stamp(os.stat(path))] for path in corpus.spec.files
    ]
    given = None if config.tokenizer is None else sha256(tokenizer_json(config.tokenizer, "tokenizer"))
    trained = [config.vocab_size, config.tokenizer_sample_mib] if given is None else []
    versions = package_versions(corpus.spec.files)
    return [files, config.text_key, config.strict, config.eod_token, given, *trained, *versions]


def _check_output(output: str) -> str:
    """The absolute prefix of the output, whose parent directory is created; of objects their URL."""
    if output.endswith((".bin", ".idx")):
        raise ValueError(f"output={output} is a prefix: name it without the suffix, output={output[:-4]}")
    if storage.is_url(output):
        _check_absent(output)
        return output
    prefix = Path(output).expanduser().absolute()
    if output.endswith("/") or prefix.name in ("", "..") or os.path.isdir(prefix):
        raise ValueError(f"output={output} names a folder; add a name for the files: output={Path(output) / 'corpus'}")
    _check_absent(str(prefix))
    return str(_with_parent(output, prefix))


def _with_parent(output: str, prefix: Path) -> Path:
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={output}: {prefix.parent} cannot be created: {error.strerror}") from error
    return prefix


def _check_absent(prefix: str) -> None:
    for suffix in _OUTPUTS.values():
        try:
            exists = storage.is_file(f"{prefix}{suffix}")
        except OSError as error:
            raise ValueError(f"output={prefix} cannot be written: {error.strerror}") from error
        if exists:
            raise ValueError(f"{prefix}{suffix} exists already; remove it or choose another output")


def _provide_tokenizer(config: PrepareConfig, corpus: TextCorpus, path: Path) -> None:
    """Writes the given tokenizer, or one trained on the corpus, to `path`, unless it is there."""
    from corpus.tokenizer import Tokenizer

    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    if config.tokenizer is not None:
        given = tokenizer_json(config.tokenizer, "tokenizer")
        Tokenizer.load(given, config.eod_token)  # validates it before copying
        shutil.copyfile(given, partial)
    else:
        sample = tokenizer_sample([corpus], config.tokenizer_sample_mib * 2**20)
        Tokenizer.train(sample, vocab_size=config.vocab_size, eod_token=config.eod_token).save(str(partial))
    os.replace(partial, path)


if __name__ == "__main__":
    cli.command(PrepareConfig, "prepare", main)
