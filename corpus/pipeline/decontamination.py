"""Drops documents that contain n-grams of evaluation tasks, which lie in local files."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import ngrams, simplify_text

from corpus.documents import BadRow, expand, has_rows, read_documents, read_rows
from corpus.pipeline.account import write_json
from corpus.pipeline.deduplication import HASH

_INDEX = ".index.hashes"
"""Of the files in which datatrove's filter expects the hashes of a task's n-grams."""
_NOTES = "notes.json"
"""Written last."""


class Decontaminate(BaseFilter):
    """Drops documents with an n-gram of an evaluation task, by datatrove's NGramsDecontFilter. Words are compared in
    lower case, without punctuation and diacritics, and all numbers are equal.

    datatrove's own index of tasks downloads them with lighteval; this one is made from local files.
    """

    name = "decontaminate"

    def __init__(
        self,
        files: Sequence[str] = (),
        keys: Sequence[str] | None = None,
        n_grams: int = 12,
        language: str = "eng",
        index: str | None = None,
    ) -> None:
        """
        Args:
            files: text files or globs of tasks, each a task: a row is an example, and so is a .txt file.
            keys: fields of a row that are joined to its text. None: all that hold text, in their order.
            n_grams: words of an n-gram.
            language: of the words, as in datatrove.
            index: the folder of the hashes, which `write_index` fills; the plan sets it.
        """
        super().__init__()
        if isinstance(files, str) or not files:
            raise ValueError(
                "prepare.steps: decontaminate: files is a list of the files of tasks: files=[tasks/*.jsonl]"
            )
        if n_grams < 1:
            raise ValueError(f"prepare.steps: decontaminate: n_grams={n_grams} must be >= 1")
        self.files, self.keys, self.index = expand([str(file) for file in files]), keys, index
        self.config, self.language = NGramsDecontConfig(n_grams=n_grams, hash_config=HASH), language

    @cached_property
    def _filter(self) -> NGramsDecontFilter:
        assert self.index is not None
        return NGramsDecontFilter(self.index, self.config, language=self.language)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        kept = self._filter.filter(doc)
        return True if kept is True else (False, doc.metadata["contaminated_task"])

    @property
    def notes(self) -> list[str]:
        """Messages about the tasks."""
        return json.loads((Path(self.index or "") / _NOTES).read_text())

    def write_index(self) -> None:
        """Writes the hashes of every task's n-grams, and messages about examples that are too short for one. Does
        nothing where that is done.

        Raises:
            ValueError: a task has no example that is long enough.
        """
        assert self.index is not None
        folder, notes = Path(self.index), []
        if (folder / _NOTES).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        names = [os.path.basename(path).split(".")[0] for path in self.files]
        for number, path in enumerate(self.files):
            hashes: set[int] = set()
            examples = short = 0
            for text in self._examples(path):
                words = self._filter.tokenizer.word_tokenize(simplify_text(text, self.config.norm_config))
                found = {self._filter.hash_func(" ".join(gram)) for gram in ngrams(words, self.config.n_grams)}
                hashes |= found
                examples, short = examples + 1, short + (not found)
            if not hashes:
                raise ValueError(f"{path} has no example of {self.config.n_grams} words or more; lower n_grams")
            if short:
                notes.append(f"{path}: {short} of {examples} examples are shorter than {self.config.n_grams} words")
            name = names[number] if names.index(names[number]) == number else f"{names[number]}_{number}"
            np.array(sorted(hashes), dtype=self.config.hash_config.np_dtype).tofile(folder / f"{name}{_INDEX}")
        write_json(folder / _NOTES, notes)

    def _examples(self, path: str) -> Iterator[str]:
        if not has_rows(path):
            yield from (document.text for document in read_documents(path, "text"))
            return
        for row in read_rows(path):
            if not isinstance(row.value, BadRow):
                yield " ".join(_texts([row.value.get(key) for key in self.keys] if self.keys else row.value))


def _texts(value: Any) -> Iterator[str]:
    """All text in a JSON value, such as a question and the list of its choices."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
