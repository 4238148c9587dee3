"""Normalises text: its Unicode form, line ends, control characters and trailing spaces."""

import re
import unicodedata

from datatrove.pipeline.formatters.base import BaseFormatter

_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


class Normalize(BaseFormatter):
    """Of a document's text: Unicode composed, CRLF and CR replaced by LF, control characters removed."""

    name = "normalize"

    def __init__(
        self, unicode: str | None = "NFC", line_ends: bool = True, control: bool = True, trailing: bool = False
    ) -> None:
        """
        Args:
            unicode: NFC, NFKC, NFD, NFKD, or None to keep the characters as they are.
            line_ends: replace CRLF and CR by LF.
            control: remove control characters except tab and line feed, and byte-order marks.
            trailing: remove spaces and tabs at the ends of lines.
        """
        super().__init__()
        if unicode is not None and unicode not in _FORMS:
            raise ValueError(f"prepare.steps: normalize: unicode={unicode} is not one of {', '.join(_FORMS)} or null")
        self.unicode, self.line_ends, self.control, self.trailing = unicode, line_ends, control, trailing

    def format(self, text: str) -> str:
        if self.line_ends:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.control:
            text = _CONTROL.sub("", text)
        if self.trailing:
            text = _TRAILING.sub("", text)
        return text if self.unicode is None else unicodedata.normalize(self.unicode, text)
