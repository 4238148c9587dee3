"""The text in a column of an Arrow table."""

from collections.abc import Iterator
from typing import Any

from corpus.readers.rows import BadRow, Document, decode, no_field

BATCH_ROWS = 256
"""Rows that are converted to Python at once."""


class TextColumn:
    """The column that text_key names, or a field of the structs in one: `a.b`."""

    def __init__(self, path: str, schema: Any, text_key: str) -> None:
        """
        Args:
            schema: pyarrow.Schema.

        Raises:
            ValueError: there is none.
        """
        self._path, self._key = path, text_key
        self._names = [text_key] if text_key in schema.names else text_key.split(".")
        fields = tree = _tree(schema)
        for name in self._names:
            if name not in fields:
                raise ValueError(f"{path} has no column {no_field(text_key, tree)}")
            fields = fields[name]

    def documents(self, batch: Any, first: int, done: float) -> Iterator[Document | BadRow]:
        """
        Args:
            batch: pyarrow.RecordBatch.
            first: the number of the first row.

        Raises:
            ValueError: the column does not hold text.
        """
        import pyarrow as arrow
        from pyarrow import compute

        column: Any = batch.column(self._names[0])
        for name in self._names[1:]:
            column = compute.call_function("struct_field", [column], compute.StructFieldOptions([name]))
        try:
            values = _as_bytes(column)
        except (arrow.ArrowNotImplementedError, arrow.ArrowTypeError) as error:
            raise ValueError(f"{self._path}: column {self._key!r} does not hold text: {error}") from error
        for number, value in enumerate(values, start=first):
            if isinstance(value, list) and None not in value:
                value = b"\n".join(value)
            if isinstance(value, bytes):
                yield Document(*decode(value), done=done, where=f"row {number}")
            else:
                what = "null" if value is None else "a list with nulls"
                yield BadRow(f"row {number}", f": column {self._key!r} is {what}")


def _tree(fields: Any) -> dict[str, Any]:
    """The names of a schema's or struct's fields, with those of the structs in them."""
    import pyarrow as arrow

    return {field.name: _tree(field.type) if arrow.types.is_struct(field.type) else {} for field in fields}


def _as_bytes(column: Any) -> list[Any]:
    """Strings as bytes, since Arrow does not validate UTF-8; lists of strings as lists of them."""
    import pyarrow as arrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    of = column.type
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        return column.cast(arrow.list_(arrow.large_binary())).to_pylist()
    return column.cast(arrow.large_binary()).to_pylist()
