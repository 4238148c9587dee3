"""The plan of a preparation: how the input is divided into tasks, and the stages that run them, as a file that every
task reads. It does not depend on the executor or the number of workers, so neither do the tokens."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from corpus import storage
from corpus.objects import explained, sizes_of
from corpus.pipeline.account import write_json
from corpus.pipeline.steps import Step
from corpus.readers.formats import package_versions

_FORMAT = 1  # incremented when the same plan leads to other tokens
_MIB = 2**20


class Refused(ValueError):
    """Nothing usable is left, or `strict` does not allow a row: what tasks have done is of no use."""


@dataclass(frozen=True)
class Stage:
    """Tasks that may run at the same time. A stage begins when the one before it is complete."""

    name: str
    tasks: int
    does: Literal["documents", "find", "finish"]
    segment: int
    """Documents: the steps up to the segment's deduplication. Finding duplicates: those of the segment before it."""


@dataclass(frozen=True)
class Plan:
    work: str
    """Folder in which tasks work, beside the output."""
    output: str
    """Folder of the result; it appears when everything is complete."""
    tasks: list[list[str]]
    """The files of each task, in order."""
    stamps: list[Any]
    """Of each file its size in bytes and modification time in ns, or the version of an object, to notice changes."""
    steps: list[dict[str, Any]]
    tokenizer: list[Any]
    """What the tokenizer is made of: a hash of the given one, or the settings of its training."""
    text_key: str
    strict: bool
    eod_token: str
    samples: int
    format: int = _FORMAT
    datatrove: str = ""
    readers: list[str] = field(default_factory=list)
    """Versions of packages that read the input."""

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @cached_property
    def parsed(self) -> list[Step]:
        return [
            Step(step["name"], step["options"] | self._folders(number, step["name"]))
            for number, step in enumerate(self.steps)
        ]

    def _folders(self, number: int, name: str) -> dict[str, str]:
        """Options that are folders of the plan."""
        return {"index": str(self.folder / f"n_grams_{number}")} if name == "decontaminate" else {}

    @cached_property
    def segments(self) -> list[tuple[list[int], int | None]]:
        """(the steps of a segment, by number, and the deduplication that ends it)."""
        found: list[tuple[list[int], int | None]] = []
        begun: list[int] = []
        for number, step in enumerate(self.parsed):
            if step.kind.does == "deduplicate":
                found.append((begun, number))
                begun = []
            else:
                begun.append(number)
        return [*found, (begun, None)]

    @cached_property
    def stages(self) -> list[Stage]:
        from corpus.pipeline.deduplication import finding

        stages = []
        for segment, (_, ends) in enumerate(self.segments):
            name = "tokenise" if ends is None else f"filter_{segment}"
            stages.append(Stage(name, len(self.tasks), "documents", segment))
            if ends is not None:
                found = finding(self.parsed[ends], self.segment_folder(segment))
                stages += [Stage(name, tasks, "find", segment) for name, tasks in found]
        return [*stages, Stage("finish", 1, "finish", 0)]

    def segment_folder(self, segment: int) -> Path:
        """Of the documents between two segments, and of the signatures of their deduplication."""
        return self.folder / f"segment_{segment}"

    def account_folder(self, number: int | Literal["read", "tokenise"]) -> Path:
        """Of the accounts of a step."""
        return self.folder / "accounts" / (number if isinstance(number, str) else f"step_{number:02d}")

    def logging_folder(self, stage: Stage) -> Path:
        """Of datatrove's logs, statistics and marks of finished tasks."""
        return self.folder / "stages" / f"{self.stages.index(stage):02d}_{stage.name}"

    def save(self) -> None:
        write_json(self.folder / "plan.json", asdict(self))

    @classmethod
    def load(cls, work: str | Path) -> "Plan":
        return cls(**json.loads((Path(work) / "plan.json").read_text()))


def divide(files: Sequence[str], task_mib: float) -> list[list[str]]:
    """The files of each task: those that follow each other, as many as have `task_mib` MiB, and at least one."""
    tasks: list[list[str]] = []
    size = 0
    for path, bytes_of_file in zip(files, sizes_of(files), strict=True):
        if not tasks or size + bytes_of_file > task_mib * _MIB:
            tasks.append([])
            size = 0
        tasks[-1].append(path)
        size += bytes_of_file
    return tasks


def new_plan(prefix: Path, files: Sequence[str], steps: Sequence[Step], task_mib: float, **settings: Any) -> Plan:
    """The plan for an output PREFIX. Settings: the other fields of a plan."""
    return Plan(
        work=f"{prefix}.work",
        output=str(prefix),
        tasks=divide(files, task_mib),
        stamps=storage.each(_stamp, files),
        steps=[{"name": step.name, "options": step.options} for step in steps],
        datatrove=version("datatrove"),
        readers=package_versions(files),
        **settings,
    )


def _stamp(path: str) -> Any:
    """What changes when a file or an object is replaced, JSON-serialisable. Raises ValueError."""
    if storage.is_url(path):
        return explained(path, storage.version)
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def begin_or_resume(plan: Plan) -> bool:
    """Writes the plan, or finds the same one from before. Returns whether it was there.

    Raises:
        ValueError: the work folder has another plan.
    """
    if not (plan.folder / "plan.json").exists():
        plan.save()
        return False
    try:
        before = asdict(Plan.load(plan.folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{plan.folder}/plan.json cannot be read: {error}; remove {plan.folder}") from error
    changed = [key for key, value in json.loads(json.dumps(asdict(plan))).items() if before[key] != value]
    if changed:
        names = {"tasks": "input or task_mib", "stamps": "the input files", "steps": "prepare.steps"}
        what = ", ".join(names.get(key, key) for key in changed)
        raise ValueError(
            f"{plan.folder} was begun with other settings ({what}): give these again to continue it, or remove it to "
            "start anew"
        )
    return True
