"""What a step of a task did: counts, reasons and samples of what it removed, as a JSON file per step and task."""

import hashlib
import heapq
import json
import os
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_EXCERPT = 400
"""Characters of a sample."""


@dataclass
class Account:
    """Of one step, in one task or in all."""

    step: str
    seen: int = 0
    removed: int = 0
    changed: int = 0
    seen_bytes: int = 0
    """UTF-8 bytes of the documents that came in."""
    removed_bytes: int = 0
    """Of removed documents, and of what was taken out of changed ones."""
    reasons: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)
    """[key, document, reason, text], those with the smallest keys: they do not depend on how tasks are divided."""
    keep: int = 3
    """Samples of each reason."""

    def came(self, text: str) -> None:
        """Counts a document that comes in."""
        self.seen += 1
        self.seen_bytes += len(text.encode())

    def remove(self, where: str, reason: str, text: str) -> None:
        """Counts a document that is dropped."""
        self.removed += 1
        self.removed_bytes += len(text.encode())
        self._sample(where, reason, text)

    def change(self, where: str, before: str, after: str) -> None:
        """Counts a document whose text is changed."""
        self.changed += 1
        self.removed_bytes += max(0, len(before.encode()) - len(after.encode()))
        self._sample(where, "changed", before, after)

    def _sample(self, where: str, reason: str, text: str, after: str | None = None) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        key = hashlib.sha256(where.encode()).hexdigest()[:16]
        of_reason = [sample for sample in self.samples if sample[2] == reason]
        if len(of_reason) < self.keep or key < max(sample[0] for sample in of_reason):
            if after is not None:  # only the lines that are not there any more
                kept = set(after.splitlines())
                text = "\n".join(line for line in text.splitlines() if line not in kept)
            self.samples.append([key, where, reason, text[:_EXCERPT]])
            self._trim()

    def _trim(self) -> None:
        reasons = Counter(sample[2] for sample in self.samples)
        self.samples = [
            sample
            for reason in reasons
            for sample in heapq.nsmallest(self.keep, (sample for sample in self.samples if sample[2] == reason))
        ]

    def add(self, other: "Account") -> None:
        """Adds that of another task."""
        for name in ("seen", "removed", "changed", "seen_bytes", "removed_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.notes += other.notes
        self.samples += other.samples
        self._trim()

    def save(self, folder: Path, rank: int) -> None:
        write_json(folder / f"{rank:05d}.json", asdict(self))

    @classmethod
    def of_tasks(cls, folder: Path, tasks: int) -> "Account":
        """The sum over tasks.

        Raises:
            OSError: that of a task is missing.
        """
        parts = [cls(**json.loads((folder / f"{rank:05d}.json").read_text())) for rank in range(tasks)]
        total = cls(parts[0].step, keep=parts[0].keep)
        for part in parts:
            total.add(part)
        return total


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
