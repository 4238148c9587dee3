"""Arrow files, such as those of a folder that `datasets.Dataset.save_to_disk` wrote; `datasets` is not needed."""

import json
import posixpath
from collections.abc import Iterator
from typing import Any

from corpus import storage
from corpus.readers.columns import BATCH_ROWS, TextColumn
from corpus.readers.rows import BadRow, Document, Row

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FILE_FORMAT = b"ARROW1"
_CONTINUED = b"\xff" * 4
"""Before each message, since Arrow 0.15."""
_END_OF_STREAM = _CONTINUED + bytes(4)


def saved_files(folder: str) -> list[str] | None:
    """The files of a data set in its order, if `save_to_disk` wrote the folder; else None.

    Raises:
        ValueError: it has several splits, or its description is damaged.
    """
    if storage.is_file(described := posixpath.join(folder, _SPLITS)):
        splits = _described(described, "splits")
        if len(splits) != 1:
            names = ", ".join(posixpath.join(folder, str(split)) for split in splits)
            raise ValueError(f"{folder} is a data set with {len(splits)} splits; name those to be read: {names}")
        folder = posixpath.join(folder, str(splits[0]))
    if not storage.is_file(described := posixpath.join(folder, _STATE)):
        return None
    try:
        files = [posixpath.join(folder, entry["filename"]) for entry in _described(described, "_data_files")]
    except (TypeError, LookupError):
        files = []
    if not files:
        raise ValueError(f"{described} does not name the files of a data set; save it again")
    return files


def _described(path: str, key: str) -> list[Any]:
    try:
        value = json.loads(storage.read_bytes(path))[key]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} does not describe a data set: {error or type(error).__name__}") from error
    if not isinstance(value, list):
        raise ValueError(f"{path} does not describe a data set: {key} is no list")
    return value


def read_rows(path: str) -> Iterator[Row]:
    """All columns of each row."""
    for batch, first, done in _batches(path):
        for number, row in enumerate(batch.to_pylist(), start=first):
            yield Row(f"row {number}", row, done)


def read_documents(path: str, text_key: str) -> Iterator[Document | BadRow]:
    """The text of each row."""
    column = None
    for batch, first, done in _batches(path):
        column = column or TextColumn(path, batch.schema, text_key)
        yield from column.documents(batch, first, done)


def _batches(path: str) -> Iterator[tuple[Any, int, float]]:
    """Parts of the file's batches, the number of their first row, and the fraction of the file read so far."""
    import pyarrow as arrow

    number = 0
    try:
        with storage.for_arrow(path) as source, _as_arrow(source) as file:
            size = max(file.size(), 1)
            is_file, ends = _magic(file), _end(file)
            reader = arrow.ipc.open_file(file) if is_file else arrow.ipc.open_stream(file)
            count = reader.num_record_batches if is_file else None
            batches = (reader.get_batch(i) for i in range(count)) if count is not None else reader
            for i, batch in enumerate(batches, start=1):
                done = i / count if count else min((file.tell() + len(_END_OF_STREAM)) / size, 1.0)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    yield part, number + 1, done
                    number += part.num_rows
            if not is_file and not ends:
                raise ValueError(f"{path} is cut off after row {number}: the end of the stream is missing")
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system; pyarrow's own have none
            raise
        raise ValueError(f"{path} is damaged after row {number}: {error}") from error


def _as_arrow(source: Any) -> Any:
    import pyarrow as arrow

    return arrow.OSFile(source) if isinstance(source, str) else arrow.PythonFile(source, mode="r")


def _magic(file: Any) -> bool:
    """Whether it is in the file format, with an index of its batches, and not a stream of them."""
    begins = file.read(len(_FILE_FORMAT)) == _FILE_FORMAT
    file.seek(0)
    return begins


def _end(file: Any) -> bool:
    """Whether a stream has its end mark, or is of a version whose mark cannot be told from data."""
    is_old = file.read(len(_CONTINUED)) != _CONTINUED
    file.seek(max(file.size() - len(_END_OF_STREAM), 0))
    ends = file.read(len(_END_OF_STREAM)) == _END_OF_STREAM
    file.seek(0)
    return ends or is_old
