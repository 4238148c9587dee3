"""Tokenises text files into Megatron token files.

    python -m launch.prepare input=FILES output=PREFIX [tokenizer=tokenizer.json] [vocab_size=4096]

writes PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json, for training with
data=megatron data.files=[PREFIX] data.tokenizer=PREFIX.tokenizer.json
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from conf.commands import PrepareConfig
from conf.override_text import command, override
from corpus.dataset_specs import DatasetSpec
from corpus.documents import expand
from corpus.integrity import sha256, stamp
from corpus.resumable import resumable_folder
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
    patterns = config.input if isinstance(config.input, list) else [config.input]
    files = expand([str(pattern) for pattern in patterns])
    prefix = _check_output(config.output)
    corpus = TextCorpus(DatasetSpec("text", files, weight=1.0, valid_share=0.0), config.text_key, strict=config.strict)
    try:
        manifest = _write(config, corpus, prefix)
    except OSError as error:
        raise ValueError(f"output={config.output} cannot be written: {error.strerror or error}") from error
    counts = manifest["splits"]["train"]
    print(f"{prefix}.bin: {counts['num_tokens']:,} tokens, documents: {counts['num_documents']:,}")
    for note in manifest["notes"]:
        print(note)
    words = [override("data.files", [str(prefix)]), override("data.tokenizer", f"{prefix}.tokenizer.json")]
    print(f"train on it: {command(['data=megatron'], words)}")
    return 0


def _write(config: PrepareConfig, corpus: TextCorpus, prefix: Path) -> dict[str, Any]:
    """Writes the three files and returns the manifest of the corpus."""
    # On the same file system: an interrupted command leaves no incomplete output. The same command continues there.
    with resumable_folder(prefix.with_name(f".{prefix.name}.partial"), _identity(config, corpus)) as folder:
        with Console() as console:
            console.progress("training the tokenizer", 0.0)
            _provide_tokenizer(config, corpus, folder / "tokenizer.json")
            console.progress("training the tokenizer", 1.0)
            write_corpus(corpus, str(folder / "tokenizer.json"), config.eod_token, folder, console.progress)
        manifest = json.loads((folder / MANIFEST).read_text())
        if "train" not in manifest["splits"]:
            raise ValueError(f"{', '.join(corpus.spec.files)} contain no text")
        for name, suffix in _OUTPUTS.items():
            os.rename(folder / name, f"{prefix}{suffix}")
    return manifest


def _identity(config: PrepareConfig, corpus: TextCorpus) -> list[Any]:
    """Everything that determines the files, JSON-serialisable."""
    files = [[path, *stamp(os.stat(path))] for path in corpus.spec.files]
    given = None if config.tokenizer is None else sha256(tokenizer_json(config.tokenizer, "tokenizer"))
    trained = [config.vocab_size, config.tokenizer_sample_mib] if given is None else []
    return [files, config.text_key, config.strict, config.eod_token, given, *trained]


def _check_output(output: str) -> Path:
    """The absolute prefix of the output, whose parent directory is created."""
    if output.endswith((".bin", ".idx")):
        raise ValueError(f"output={output} is a prefix: name it without the suffix, output={output[:-4]}")
    prefix = Path(output).expanduser().absolute()
    if output.endswith("/") or prefix.name in ("", "..") or os.path.isdir(prefix):
        raise ValueError(f"output={output} names a folder; add a name for the files: output={Path(output) / 'corpus'}")
    for suffix in _OUTPUTS.values():
        if os.path.exists(f"{prefix}{suffix}"):
            raise ValueError(f"{prefix}{suffix} exists already; remove it or choose another output")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={output}: {prefix.parent} cannot be created: {error.strerror}") from error
    return prefix


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
