"""The typed settings of `python -m launch.data inspect`."""

from dataclasses import dataclass
from typing import Any


@dataclass
class InspectDataConfig:
    """python -m launch.data inspect PATH: what is in text or token files."""

    path: Any = "???"
    """Text files as data.files takes them (paths, globs, folders, URLs), or the prefix of a .bin/.idx pair; a list of
    these for several. It can be given without `path=`."""
    text_key: str = "text"
    """Name of the field that holds the text of a row, as data.text_key."""
    tokenizer: str | None = None
    """Path of a tokenizer, as data.tokenizer: lengths are in tokens then. null: characters; of a .bin/.idx pair,
    PREFIX.tokenizer.json where it exists."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token, of whose absence in a .bin/.idx pair the documents are counted. A tokenizer without it is
    accepted."""
    full: bool = False
    """Read everything. false: of text the first documents of each file, 2,000 in all, and of token files all lengths
    but at most 64 Mi tokens."""
    samples: int = 3
    """Documents that are printed, their beginnings only."""
    strict: bool = False
    """End with exit code 2 if there is any problem. false: only if nothing can be read."""
