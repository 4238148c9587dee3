"""The sequences of training on preferences: those of a prompt follow each other, the best response first.

Legend: S sequence, P prompts, K responses.
"""

import numpy as np
import torch

from corpus.prepare import Prepared, Source
from corpus.prepare_preferences import ARRAYS


class PreferenceSet:
    """The prompts of a split in file order, each with K sequences; those that it does not have are padding.

    `sample(index)` is sequence index % K of prompt index // K: tokens, labels, positions int64 [S], loss_mask float32
    [S] (labels that belong to the response), padding bool [S] and, where there is a reference, reference_logps float64
    []. Beyond the last prompt all is padding."""

    def __init__(self, source: Source, *, sequence_length: int, responses: int) -> None:
        self.source, self._length, self.responses = source, sequence_length, responses
        self._tokens, self._counts, self._sequences, self._prompts = (
            np.load(f"{source.prefix}.{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
        )
        self.reference_PK: np.ndarray | None = None
        """Log-probabilities of the responses under the reference."""

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def __len__(self) -> int:
        """Number of sequences, padding included."""
        return self.num_prompts * self.responses

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        prompt, number = divmod(index, self.responses)
        ids, counts = np.empty(0, np.int64), np.empty(0, np.bool_)
        if prompt < self.num_prompts:
            first, end = self._prompts[prompt - 1] if prompt else 0, self._prompts[prompt]
            if (sequence := first + number) < end:
                within = slice(self._sequences[sequence - 1] if sequence else 0, self._sequences[sequence])
                ids, counts = self._tokens[within].astype(np.int64), self._counts[within]
        size, length = self._length, len(ids)
        tokens = torch.zeros(size, dtype=torch.int64)
        tokens[:length] = torch.from_numpy(ids)
        loss_mask = torch.zeros(size)
        loss_mask[: max(length - 1, 0)] = torch.from_numpy(counts[1:].astype(np.float32))
        sample = {
            "tokens": tokens,
            "labels": tokens.roll(-1),
            "loss_mask": loss_mask,
            "padding": torch.arange(size) >= length,
            "positions": torch.arange(size),
        }
        if self.reference_PK is not None:
            value = self.reference_PK[prompt, number] if prompt < self.num_prompts else 0.0
            sample["reference_logps"] = torch.tensor(value, dtype=torch.float64)
        return sample


class PreferenceStream:
    """The infinite stream of training sequences: the prompts of each epoch in an order of their own, which depends only
    on the data, the seed and the epoch."""

    def __init__(self, prompts: PreferenceSet, *, seed: int) -> None:
        self.prompts, self._seed = prompts, seed
        self._order: tuple[int, np.ndarray] | None = None

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` >= 0, as PreferenceSet.sample."""
        responses = self.prompts.responses
        prompt, number = divmod(index, responses)
        epoch, place = divmod(prompt, self.prompts.num_prompts)
        if self._order is None or self._order[0] != epoch:
            seed = np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]
            self._order = epoch, np.random.RandomState(seed).permutation(self.prompts.num_prompts)
        return self.prompts.sample(int(self._order[1][place]) * responses + number)


def training_set(prepared: Prepared, *, sequence_length: int, responses: int) -> PreferenceSet:
    (source,) = prepared.train
    return PreferenceSet(source, sequence_length=sequence_length, responses=responses)


def held_out_set(prepared: Prepared, *, sequence_length: int, responses: int) -> PreferenceSet:
    (source,) = prepared.valid
    return PreferenceSet(source, sequence_length=sequence_length, responses=responses)
