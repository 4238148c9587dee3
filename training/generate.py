"""Text generation for samples. There is no key/value cache: each token takes a forward pass over the whole context."""

from collections.abc import Iterator

import torch

from corpus.tokenizer import Tokenizer
from models.logits import next_token_logits
from training.builder import BuiltModel
from training.sampling import next_token


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
    """Generates the tokens that follow a prompt, until max_tokens or the end of the document. Every rank calls this
    together and gets the same tokens. Routing is dropless, so that a token does not depend on the rest of the batch.

    Args:
        prompt: at least one token.
        temperature: 0: always the most likely token.
    """
    assert prompt
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_tokens):
        window = ids[-built.config.train.sequence_length :]
        logits_V = next_token_logits(built.engine, built.config.model.vocab_size, window)
        ids.append(next_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
        if ids[-1] == eod_id:
            return
        yield ids[-1]


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
