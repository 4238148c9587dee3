"""Rewards of conversations under a reward model.

Legend: B sequences, S sequence (this rank's shard).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from corpus.chat_template import ChatTemplate
from corpus.documents import Row
from corpus.preferences import InvalidRow, conversation_ids
from corpus.tokenizer import Tokenizer
from models.objectives import sequence_rewards
from parallel.engine import Batch
from training.load_checkpoint import LoadedModel
from training.preferences import value_of_each
from training.run_dir import TOKENIZER


class _Sequences:
    """Token ids as padded sequences; `sample` as of corpus.preference_stream.PreferenceSet."""

    def __init__(self, ids: list[list[int]], length: int):
        self._ids, self._length = ids, length

    def __len__(self) -> int:
        return len(self._ids)

    def sample(self, index: int) -> dict[str, Tensor]:
        ids = self._ids[index] if index < len(self) else []
        tokens, at = torch.zeros(self._length, dtype=torch.int64), torch.arange(self._length)
        tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        padding = at >= len(ids)
        return {"tokens": tokens, "labels": tokens.roll(-1), "loss_mask": (~padding).float(), "padding": padding} | {
            "positions": at
        }


def rewards_of(loaded: LoadedModel, file: str, rows: Sequence[Row]) -> np.ndarray:
    """fp64 [rows]: the reward of each conversation. Every rank calls this together and gets the same.

    Raises:
        ValueError: not a reward model, no tokenizer, or a row that is not a conversation of at most the run's sequence
            length.
    """
    run = loaded.built.config
    if not run.model.reward_head:
        raise ValueError(f"{loaded.run_dir} is not a reward model (model.reward_head=true, train.objective=reward)")
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.run_dir} has no {TOKENIZER}, so that text cannot be tokenised")
    template = ChatTemplate.of(loaded.run_dir / TOKENIZER, run.data.eod_token)
    ids = [_ids(file, row, loaded.tokenizer, template, run.train.sequence_length) for row in rows]
    cp = loaded.built.runtime.groups.cp

    def rewards(output_BS: Tensor, batch: Batch) -> Tensor:
        return sequence_rewards(output_BS, batch, cp)[0]

    return value_of_each(loaded.built, _Sequences(ids, run.train.sequence_length), rewards).numpy()


def _ids(file: str, row: Row, tokenizer: Tokenizer, template: ChatTemplate, longest: int) -> list[int]:
    try:
        ids = conversation_ids(row.value, tokenizer, template)
        if len(ids) > longest:
            raise InvalidRow(f"has {len(ids)} tokens, more than the {longest} of the run's train.sequence_length")
    except InvalidRow as problem:
        raise ValueError(f"{file} {row.where} {problem}") from None
    return ids
