"""The steps of a task, as datatrove runs them. Each holds only names and numbers and reads the plan when it runs: a
task can be sent to any machine, and starts anew after a failure."""

import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.pipeline.formatters.base import BaseFormatter

from corpus.documents import BadFile, SkippedRows, read_documents
from corpus.indexed import read_index
from corpus.integrity import sha256
from corpus.pipeline import deduplication
from corpus.pipeline.account import Account, write_json
from corpus.pipeline.plan import Plan, Refused, Stage
from corpus.readers.rows import replaced_note
from corpus.token_writer import TokenWriter
from corpus.tokenizer import Tokenizer

Documents = Iterable[Document]


class Block(PipelineStep):
    """A step of a task of the plan in a work folder."""

    type = "SWITCHYARD"

    def __init__(self, work: str, number: int = 0) -> None:
        self.work, self.number = work, number
        super().__init__()

    @property
    def plan(self) -> Plan:
        return Plan.load(self.work)

    def __repr__(self) -> str:
        return f"{self.name} {self.number}"


class ReadInput(Block):
    """Reads the files of a task. Rows that cannot be used are counted; so are files, from where they are damaged. One
    that cannot be read now is an error of the task, which can be run again."""

    name = "read"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        plan, account = self.plan, Account("read")
        for path in plan.tasks[rank]:
            skipped, replaced, first = SkippedRows(), 0, ""
            try:
                found = read_documents(path, plan.text_key, strict=plan.strict, skipped=skipped)
                for number, document in enumerate(found, start=1):
                    account.came(document.text)
                    if document.replaced:
                        first = first if replaced else document.where
                        replaced += document.replaced
                    where = f"{path} document {number}"
                    yield Document(document.text, where, metadata={deduplication.TASK: rank})
            except BadFile as error:
                if plan.strict:
                    raise Refused(str(error)) from error
                skipped.rest = str(error)
                account.reasons["unusable file"] = account.reasons.get("unusable file", 0) + 1
            if skipped:
                account.notes.append(skipped.note(path))
            if skipped.count:
                account.reasons["unusable row"] = account.reasons.get("unusable row", 0) + skipped.count
            if replaced:
                account.notes.append(replaced_note(path, replaced, first))
        account.save(plan.account_folder("read"), rank)


class Apply(Block):
    """Applies a filter or formatter of datatrove to each document, and keeps an account of it."""

    name = "apply"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        plan = self.plan
        step = plan.parsed[self.number]
        inner, account = step.make(), Account(step.name, keep=plan.samples)
        if rank == 0:
            account.notes += getattr(inner, "notes", [])
        for document in data or ():
            before = document.text
            account.came(before)
            with self.track_time():
                kept, reason = _applied(inner, document)
            if kept and document.text:
                if document.text != before:
                    account.change(document.id, before, document.text)
                yield document
            else:
                account.remove(document.id, reason or ("empty" if kept else step.name), before)
        account.save(plan.account_folder(self.number), rank)


def _applied(inner: Any, document: Document) -> tuple[bool, str | None]:
    """Whether a document is kept, and why not. Its text may be changed."""
    if isinstance(inner, BaseFormatter):
        document.text = inner.format(document.text)
        return True, None
    try:
        return get_filter_result(inner.filter(document))
    except ZeroDivisionError:  # datatrove's ratios of a document without words
        return False, "no words"


class KeepDocuments(Block):
    """Writes the documents of a task for the stage after a deduplication, and passes them on."""

    name = "keep"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = _kept(self.plan, self.number, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        with zstandard.open(partial, "wt", encoding="utf-8", newline="\n") as file:
            for document in data or ():
                file.write(json.dumps([document.id, document.text], ensure_ascii=False) + "\n")
                yield document
        os.replace(partial, path)


class ReadKept(Block):
    """Reads what KeepDocuments wrote."""

    name = "read kept"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with open(_kept(self.plan, self.number, rank), "rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
                where, text = json.loads(line)
                yield Document(text, where, metadata={deduplication.TASK: rank})


def _kept(plan: Plan, segment: int, rank: int) -> Path:
    return plan.segment_folder(segment) / "documents" / f"{rank:05d}.jsonl.zst"


class Signatures(Block):
    """Writes the signatures of a task's documents, by datatrove's step of the deduplication that ends a segment."""

    name = "signatures"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Any:
        plan, (_, ends) = self.plan, self.plan.segments[self.number]
        assert ends is not None
        inner = deduplication.signatures(plan.parsed[ends], plan.segment_folder(self.number))
        return inner.run(data, rank, world_size)


class FindDuplicates(Block):
    """Finds which documents of all tasks are duplicates."""

    name = "find"

    def __init__(self, work: str, number: int, what: str) -> None:
        self.what = what
        super().__init__(work, number)

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Any:
        plan, (_, ends) = self.plan, self.plan.segments[self.number]
        assert ends is not None
        inner = deduplication.find(plan.parsed[ends], self.what, plan.segment_folder(self.number))
        return inner.run(None, rank, world_size)


class DropDuplicates(Block):
    """Drops the duplicates of a task."""

    name = "drop"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        plan, (_, ends) = self.plan, self.plan.segments[self.number]
        assert ends is not None
        account = Account(plan.parsed[ends].name, keep=plan.samples)
        inner = deduplication.dropping(plan.parsed[ends], plan.segment_folder(self.number), _Removed(account))

        def counted() -> Iterator[Document]:
            for document in data or ():
                account.came(document.text)
                yield document

        yield from inner.run(counted(), rank, world_size)
        account.save(plan.account_folder(ends), rank)


class _Removed:
    """What datatrove's deduplication takes for a writer of dropped documents."""

    def __init__(self, account: Account) -> None:
        self.account = account

    def __enter__(self) -> "_Removed":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        self.account.remove(document.id, "duplicate", document.text)


class WriteShard(Block):
    """Tokenises the documents of a task into a .bin/.idx pair, with its hashes. A task without documents has none."""

    name = "tokenise"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        plan, account, writer = self.plan, Account("tokenise"), None
        folder = plan.folder / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{rank:05d}.{uuid.uuid4().hex}.partial"
        for document in data or ():
            if writer is None:
                tokenizer = Tokenizer.load(str(plan.folder / "tokenizer.json"), plan.eod_token)
                writer = TokenWriter(str(partial), tokenizer, measure=False)
            account.came(document.text)
            writer.add(document.text)
        shard: dict[str, Any] = {"num_documents": 0}
        if writer is not None:
            writer.finish()
            index = read_index(str(partial))
            shard = {"num_documents": index.num_documents, "num_tokens": index.num_tokens(0, index.num_documents)}
            shard |= {"text_bytes": account.seen_bytes, "dtype": index.dtype.__name__}
            for suffix in (".bin", ".idx"):
                path = f"{partial}{suffix}"
                shard[suffix[1:]] = {"bytes": os.path.getsize(path), "sha256": sha256(path)}
                os.replace(path, folder / f"{rank:05d}{suffix}")
        write_json(folder / f"{rank:05d}.json", shard | {"input": plan.tasks[rank]})
        account.save(plan.account_folder("tokenise"), rank)


class Finish(Block):
    """Puts the shards of all tasks together."""

    name = "finish"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        from corpus.pipeline.result import finish

        finish(self.plan)


def blocks(plan: Plan, stage: Stage) -> list[PipelineStep]:
    """The steps of the tasks of a stage."""
    work, segment = plan.work, stage.segment
    if stage.does == "finish":
        return [Finish(work)]
    if stage.does == "find":
        return [FindDuplicates(work, segment, stage.name)]
    steps, ends = plan.segments[segment]
    first = [ReadInput(work)] if segment == 0 else [ReadKept(work, segment - 1), DropDuplicates(work, segment - 1)]
    last = [WriteShard(work)] if ends is None else [KeepDocuments(work, segment), Signatures(work, segment)]
    return [*first, *(Apply(work, number) for number in steps), *last]
