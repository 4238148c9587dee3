"""Parquet files. At most one row group is in memory."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from corpus import storage
from corpus.readers.columns import BATCH_ROWS, TextColumn
from corpus.readers.rows import BadRow, Document, Row


def read_rows(path: str) -> Iterator[Row]:
    """All columns of each row."""
    number = 0
    with _damage(path, lambda: number), storage.for_arrow(path) as source:
        file = _open(source)
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", row, number / file.metadata.num_rows)


def read_documents(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """The text of each row; other columns are not read."""
    number = 0
    with _damage(path, lambda: number), storage.for_arrow(path) as source:
        file = _open(source)
        column = TextColumn(path, file.schema_arrow, text_key)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[text_key]):
            first, number = number + 1, number + batch.num_rows
            yield from column.documents(batch, first, number / file.metadata.num_rows)


def _open(source: Any) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(source)


@contextmanager
def _damage(path: str, row: Callable[[], int]) -> Generator[None]:
    """Names the row after which a file cannot be read."""
    import pyarrow as arrow

    try:
        yield
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system; pyarrow's own have none
            raise
        raise ValueError(f"{path} is damaged after row {row()}: {error}") from error
