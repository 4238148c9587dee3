"""Text generation: batches of continuations with a key/value cache, under any layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corpus.tokenizer import Tokenizer
from models.cached_logits import CachedLogits, Routed
from models.logits import next_token_logits
from moe.counter_rng import key
from parallel.layout import cache_unsupported_reason
from training.builder import BuiltModel
from training.sampling import likeliest_tokens, next_token
from training.text_stream import TextStream

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a continuation ends."""

    max_tokens: int
    temperature: float = 0.0
    """0: always the most likely token."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234
    end_ids: frozenset[int] = frozenset()
    """Tokens that end a continuation and are no part of it."""

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        return next_token(
            logits_V, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, generator=generator
        )

    def draw_all(
        self, logits_RV: Tensor, generators: Sequence[torch.Generator], wanted: Sequence[bool]
    ) -> list[int | None]:
        """A token of each row that is wanted."""
        if self.temperature == 0:
            return [t if w else None for t, w in zip(likeliest_tokens(logits_RV, wanted), wanted, strict=True)]
        rows = zip(logits_RV, generators, wanted, strict=True)
        return [self.draw(logits_V, generator) if w else None for logits_V, generator, w in rows]


@dataclass
class Continuation:
    """A prompt and what is generated after it."""

    prompt: list[int]
    """At least one token."""
    index: int = 0
    """Of the prompt. With the sample and the seed it names the random numbers, whatever else is in the batch."""
    sample: int = 0
    stream: TextStream | None = None
    """Takes the tokens, and ends the continuation at a stop string."""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """stop: an end-of-text token or a stop string; length: max_tokens; None: it has not ended."""
    new_text: str = ""
    """What the last token added to the text of the stream."""

    def add(self, token: int, sampling: Sampling) -> None:
        """Adds a token that was drawn."""
        self.new_text = ""
        if token in sampling.end_ids:
            self.finish_reason = STOP
        else:
            self.ids.append(token)
            if self.stream is not None:
                self.new_text = self.stream.push(token)
                self.finish_reason = STOP if self.stream.stopped else None
            if self.finish_reason is None and len(self.ids) == sampling.max_tokens:
                self.finish_reason = LENGTH
        if self.finish_reason is not None and self.stream is not None:
            self.new_text += self.stream.finish()


def continue_batch(
    built: BuiltModel,
    batch: Sequence[Continuation],
    sampling: Sampling,
    on_routed: Callable[[Continuation, Routed], None] | None = None,
) -> Iterator[None]:
    """Generates all continuations of a batch together and yields after each token. Every rank calls this together and
    gets the same. Routing is dropless and a sequence sees nothing of the others, so that up to rounding a continuation
    does not depend on the batch.

    Args:
        on_routed: called with what the routers decided for the further tokens of a continuation: first those of its
            prompt, then each one that was generated but the last.
    """
    cached = CachedLogits(
        built.engine, built.config.model, built.config.train.sequence_length, trace=on_routed is not None
    )
    yield from continue_from(cached, cached.start([c.prompt for c in batch]), batch, sampling, on_routed)


def continue_from(
    cached: CachedLogits,
    logits_RV: Tensor,
    batch: Sequence[Continuation],
    sampling: Sampling,
    on_routed: Callable[[Continuation, Routed], None] | None = None,
) -> Iterator[None]:
    """continue_batch, of prompts that have been read.

    Args:
        logits_RV: of the token after each prompt.
    """
    generators = [torch.Generator().manual_seed(key(sampling.seed, "sample", c.index, c.sample)) for c in batch]
    while True:
        if on_routed is not None:
            for continuation, routed in zip(batch, cached.routed, strict=True):
                if continuation.finish_reason is None:
                    on_routed(continuation, routed)
        tokens = sampling.draw_all(logits_RV, generators, [c.finish_reason is None for c in batch])
        for continuation, token in zip(batch, tokens, strict=True):
            continuation.new_text = ""
            if token is not None:
                continuation.add(token, sampling)
        yield
        if all(continuation.finish_reason is not None for continuation in batch):
            return
        logits_RV = cached.step([c.ids[-1] if c.finish_reason is None else None for c in batch])


def generate(
    built: BuiltModel,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    eod_id: int | None,
) -> Iterator[int]:
    """The tokens that follow a prompt, until max_tokens or the end of the document, under every layout: one that shards
    sequences has no cache, and each token takes a pass over the whole context. Every rank calls this together and gets
    the same tokens.

    Args:
        prompt: at least one token.
        temperature: 0: always the most likely token.
    """
    assert prompt
    ends = frozenset() if eod_id is None else frozenset({eod_id})
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, ends)
    continuation, layout = Continuation(list(prompt)), built.runtime.layout
    if cache_unsupported_reason(cp=layout.cp, sequence_parallel=layout.sequence_parallel) is None:
        passes = continue_batch(built, [continuation], sampling)
    else:
        passes = _continue_without_cache(built, continuation, sampling)
    for _ in passes:
        if continuation.finish_reason != STOP:
            yield continuation.ids[-1]


def _continue_without_cache(built: BuiltModel, continuation: Continuation, sampling: Sampling) -> Iterator[None]:
    generator = torch.Generator().manual_seed(key(sampling.seed, "sample", continuation.index, continuation.sample))
    limit = built.config.train.sequence_length
    context = continuation.prompt[-limit:]
    while continuation.finish_reason is None:
        logits_V = next_token_logits(built.engine, built.config.model.vocab_size, context)
        continuation.add(sampling.draw(logits_V, generator), sampling)
        yield
        if len(context) == limit:  # as CachedLogits
            del context[: -max(1, limit // 2)]
        context.extend(continuation.ids[-1:])


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; for an empty prompt the end-of-document token, which precedes every document.

    Raises:
        ValueError: the prompt is empty and the tokenizer has no such token.
    """
    ids = tokenizer.encode(prompt)
    if ids:
        return ids
    if tokenizer.eod_id is None:
        raise ValueError("prompt is empty and the tokenizer has no end-of-document token to start from; set a prompt")
    return [tokenizer.eod_id]
