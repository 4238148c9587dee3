"""A file format by the recipe of CONTRIBUTING.md."""

import gzip
from pathlib import Path

import pytest

from corpus.documents import SkippedRows, expand, read_documents, read_rows
from tests.extensions.recipes import follow


def test_a_file_format(tmp_path: Path) -> None:
    path = tmp_path / "reviews.tsv.gz"
    path.write_bytes(gzip.compress('\ufeffid\treview\r\n1\tgood é\r\n2\r\n3\t"of two\nlines"\r\n'.encode()))
    with pytest.raises(ValueError, match=r"reviews\.tsv\.gz: unknown file format"):
        expand([str(path)])
    follow("A file format")
    assert expand([str(tmp_path)]) == [str(path)]
    skipped = SkippedRows()
    documents = list(read_documents(str(path), "review", skipped=skipped))
    assert [document.text for document in documents] == ["good é", "of two\nlines"] and documents[-1].done == 1.0
    assert skipped.first == ["row 2 has another number of columns than the first line"]
    assert next(read_rows(str(path))).value == {"id": "1", "review": "good é"}
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"reviews\.tsv\.gz is damaged: it ends in the middle of the compressed data"):
        list(read_documents(str(path), "review"))
