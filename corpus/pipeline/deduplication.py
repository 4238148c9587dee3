"""The stages of exact and MinHash deduplication, by datatrove's steps: signatures of each task's documents, then which
of them are duplicates, over all tasks, then dropping these."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from corpus.pipeline.steps import Step

MAX_TASKS = 65_535
"""Of exact deduplication: datatrove's priority of a document is a positive 16-bit number."""
TASK = "task"
"""In a document's metadata: the number of its task."""
HASH = HashConfig(hash_fc="sha1")
"""64 bits. datatrove's default hashes text with xxhash, which takes none since its version 4."""


@dataclass
class Exact:
    """Drops documents whose text is equal to that of an earlier one. It has no options."""


def _text(document: Document) -> str:
    return document.text


def _priority(document: Document) -> int:
    """The earlier task's document is kept; within a task, datatrove keeps the earlier one."""
    return MAX_TASKS - document.metadata[TASK]


def _exact() -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=_text, document_priority=_priority, hash_config=HASH)


def _minhash(step: Step) -> tuple[MinhashConfig, str]:
    config = replace(step.make(), hash_config=HASH)
    for key in ("n_grams", "num_buckets", "hashes_per_bucket"):
        if getattr(config, key) < 1:
            raise ValueError(f"prepare.steps: minhash: {key}={getattr(config, key)} must be >= 1")
    return config, step.options.get("language", "eng")


def check(step: Step, tasks: int) -> None:
    """Raises ValueError where the deduplication cannot work."""
    if step.name == "minhash":
        _minhash(step)
    elif tasks > MAX_TASKS:
        raise ValueError(f"exact deduplication takes at most {MAX_TASKS} tasks, not {tasks}; raise task_mib")


def signatures(step: Step, folder: Path) -> PipelineStep:
    """The step at the end of a task that writes the signatures of its documents."""
    if step.name == "exact":
        return ExactDedupSignature(str(folder / "signatures"), _exact())
    config, language = _minhash(step)
    return MinhashDedupSignature(str(folder / "signatures"), config, language)


def finding(step: Step, folder: Path) -> list[tuple[str, int]]:
    """The stages between signatures and dropping: (name, number of tasks)."""
    return [("find", 1)] if step.name == "exact" else [("match", _minhash(step)[0].num_buckets), ("cluster", 1)]


def find(step: Step, name: str, folder: Path) -> PipelineStep:
    """The step of one of these stages."""
    source, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    if name == "find":
        return ExactFindDedups(source, duplicates, _exact())
    config, _ = _minhash(step)
    if name == "match":
        return MinhashDedupBuckets(source, str(folder / "matches"), config=config)
    return MinhashDedupCluster(str(folder / "matches"), duplicates, config)


def dropping(step: Step, folder: Path, removed: Any) -> PipelineStep:
    """The step that drops duplicates. `removed`: an exclusion writer, which gets them."""
    duplicates = folder / "duplicates"
    duplicates.mkdir(parents=True, exist_ok=True)  # there is none without a duplicate
    if step.name == "exact":
        return ExactDedupFilter(str(duplicates), _exact(), removed)
    return MinhashDedupFilter(str(duplicates), removed)
