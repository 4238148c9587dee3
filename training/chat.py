"""A conversation with a model."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from corpus.tokenizer import Tokenizer
from models.cached_logits import CachedLogits
from training.builder import BuiltModel
from training.generate import Continuation, Sampling, continue_from
from training.prompts import ChatFormat
from training.text_stream import TextStream


class Conversation:
    """The messages so far, and the key/value cache of their tokens: a turn reads what is new alone, as long as the
    template leaves the turns before it as they were."""

    def __init__(
        self, built: BuiltModel, tokenizer: Tokenizer, run_dir: Path, sampling: Sampling, stop: Sequence[str] = ()
    ):
        self.format, self.tokenizer, self.stop = ChatFormat(tokenizer, run_dir), tokenizer, stop
        self.sampling = replace(sampling, end_ids=sampling.end_ids | self.format.end_ids())
        self.limit = built.config.train.sequence_length
        self.cached = CachedLogits(built.engine, built.config.model, self.limit)
        self.messages: list[dict[str, str]] = []
        self.seen: tuple[str, list[int]] = ("", [])
        """The conversation up to the last answer as text, and as the tokens that the model has read and written."""
        self.turn = 0
        self.finish_reason: str | None = None
        """Of the last answer; None: it was broken off."""
        self.is_cut = False
        """Whether the last turn began with more tokens than the context has."""

    def reset(self, system: str | None = None) -> None:
        """Begins a new conversation."""
        self.messages, self.turn = [] if system is None else [{"role": "system", "content": system}], 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields the answer to a message piece by piece. What has come of it is part of the conversation, also if the
        caller stops.

        Raises:
            ValueError: the template refuses the conversation; the message is left out of it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        written = self.format.template.render(messages, add_generation_prompt=True)
        ids = self._encoded(written)
        self.messages, self.is_cut, self.finish_reason = messages, len(ids) > self.limit, None
        stream = TextStream(self.tokenizer, ids, self.stop)
        continuation = Continuation(ids, self.turn, 0, stream)
        self.turn += 1
        try:
            for _ in continue_from(self.cached, self._read(ids), [continuation], self.sampling):
                yield continuation.new_text
        finally:
            self.finish_reason = continuation.finish_reason
            self.messages.append({"role": "assistant", "content": stream.text})
            # Of an answer that was cut within its tokens, the text alone counts.
            cut = stream.stopped or continuation.finish_reason is None
            self.seen = ("", []) if cut else (written + stream.text, ids + continuation.ids)

    def _encoded(self, written: str) -> list[int]:
        """The tokens of a conversation. Earlier answers keep the tokens that they were written with: encoded again,
        their text could have others."""
        text, ids = self.seen
        if text and written.startswith(text):
            return ids + self.format.encode_text(written[len(text) :])
        return self.format.encode_text(written)

    def _read(self, ids: list[int]) -> Tensor:
        """The logits after the conversation."""
        known = self.cached.contexts[0] if self.cached.contexts else []
        if known and len(known) < len(ids) <= self.limit and ids[: len(known)] == known:
            return self.cached.extend(ids[len(known) :])
        return self.cached.start([ids])
