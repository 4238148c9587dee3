"""Small corpora and ways to look at the result of a preparation."""

import json
import random
from pathlib import Path
from typing import Any

from conf.commands import PrepareConfig
from corpus.shards import read_manifest, shard_prefixes
from corpus.tokenizer import Tokenizer
from tests.corpus.helpers import token_range

STEPS = ["normalize", {"gopher_quality": {"min_doc_words": 20}}, "exact", {"minhash": {"num_buckets": 4}}, "pii"]
EOD = "<|endoftext|>"
_WORDS = ("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "state", "family")


def prose(seed: int, sentences: int = 12) -> str:
    """English-looking text that no filter for repetition or quality drops."""
    draw = random.Random(seed)
    return " ".join(
        f"The {' '.join(draw.choice(_WORDS) for _ in range(draw.randint(4, 8)))} number {draw.randint(1, 9999)} of the "
        f"{draw.choice(_WORDS)} and that is to have it with {draw.choice(_WORDS)} {seed * 100 + n}."
        for n in range(sentences)
    )


def write_corpus(folder: Path, files: int = 4, documents: int = 5) -> list[str]:
    """Files of prose, the texts of which are returned in order; the last begins with a copy of the third document, a
    near-copy of the second, a short one, and a row that is not JSON."""
    texts = [prose(seed) for seed in range(files * documents)]
    begin = (files - 1) * documents
    texts[begin:begin] = [texts[2], texts[1] + " The end.", "too short"]
    for number in range(files):
        end = (number + 1) * documents if number < files - 1 else len(texts)
        rows = [json.dumps({"text": text}) for text in texts[number * documents : end]]
        if number == files - 1:
            rows.insert(3, "{not JSON")
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    return texts


def settings(folder: Path, output: str, steps: list[Any] | None = None, **changes: Any) -> PrepareConfig:
    """Every file of the corpus is a task."""
    config = PrepareConfig(input=f"{folder}/*.jsonl", output=str(folder / output), executor="local", vocab_size=300)
    config.task_mib, config.prepare.steps = 1e-6, STEPS if steps is None else steps
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def documents_of(folder: Path) -> list[str]:
    """The text of the shards, document by document."""
    tokenizer = Tokenizer.load(str(folder / "tokenizer.json"), EOD)
    text = ""
    for prefix, shard in zip(shard_prefixes(str(folder)), read_manifest(folder)["shards"], strict=True):
        text += tokenizer.decode(token_range(prefix, 0, shard["num_documents"]).tolist())
    return text.split(EOD)[:-1]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
