"""Generated tokens as text, as they come: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from corpus.tokenizer import Tokenizer

_CONTEXT = 8
"""Tokens before a text that may decide how it begins, such as with a space or without."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one continuation."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """Args:
        prompt: the tokens that the text follows.
        stop: strings of which none is empty.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._first, self._read = 0, len(self._ids)
        """Tokens from `_first` to `_read` are what the next text is decoded after."""
        self._held = ""
        self.text = ""
        """What `push` and `finish` have returned."""
        self.stopped = False
        """Whether a stop string has come: the text ends before it."""

    def push(self, token: int) -> str:
        """Adds a token. Returns the further text that is certain: whole characters that begin no stop string."""
        self._ids.append(token)
        return self._emit(self._decoded(), last=False)

    def finish(self) -> str:
        """The text that was held back. Called after the last token."""
        return self._emit(self._decoded(whole=False), last=True)

    def _decoded(self, *, whole: bool = True) -> str:
        """The text of the tokens since the last call; none if it ends within a character and `whole` is set."""
        decode = self._tokenizer.decode
        before, text = decode(self._ids[self._first : self._read]), decode(self._ids[self._first :])
        if whole and text.endswith(_INCOMPLETE):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _emit(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = min((at for stop in self._stop if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, shown, held = True, held[:found], ""
        else:
            certain = len(held) if last else len(held) - self._begun(held)
            shown, held = held[:certain], held[certain:]
        self._held = held
        self.text += shown
        return shown

    def _begun(self, text: str) -> int:
        """Characters at the end of a text that a stop string may begin with."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
