"""What the tests of the corpus share."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from corpus.indexed import TokenFile
from corpus.prepare import Prepared, Source


def write_pair(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> str:
    """PREFIX.bin/.idx as Megatron's tools write them, a document per list of token ids."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def token_range(prefix: str, first_document: int, num_documents: int) -> np.ndarray:
    """The concatenated tokens of a range of documents, int64."""
    file = TokenFile(prefix)
    counts = file.index.num_tokens(0, first_document), file.index.num_tokens(first_document, num_documents)
    return file.read(*counts)


def prepared_of(prefixes: dict[str, list[list[int]]], weights: list[float], eod_id: int | None = 0) -> Prepared:
    """Data that trains on, and holds out, all documents of some pairs."""
    sources = [
        Source(prefix, weight, 0, len(documents), sum(map(len, documents)))
        for (prefix, documents), weight in zip(prefixes.items(), weights, strict=True)
    ]
    return Prepared(
        train=sources,
        valid=sources,
        tokenizer=None,
        vocab_size=1 << 16,
        eod_id=eod_id,
        valid_bytes=None,
        valid_gzip_bytes=None,
        notes=[],
    )
