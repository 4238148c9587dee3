"""The typed settings of `python -m launch.score`."""

from dataclasses import dataclass
from typing import Any

from conf.commands import InferenceConfig


@dataclass(kw_only=True)
class ScoreConfig(InferenceConfig):
    """python -m launch.score: rewards of conversations under a reward model, or an ensemble of them."""

    checkpoint: Any = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step; of an ensemble a list of
    them."""
    input: str = "???"
    """File of conversations (.jsonl .jsonl.gz .jsonl.zst .parquet). A row has `messages`, or `prompt` and `response`,
    each a string or a list of messages."""
    output: str = "???"
    """File of the rows in the same order with their `reward` (.jsonl); it must not exist. Of an ensemble: `reward` is
    the mean of its members' rewards minus deviations standard deviations; `rewards`, `reward_mean` and `reward_std` are
    written too."""
    deviations: float = 1.0
    """Of an ensemble, the number k of standard deviations that are subtracted from the mean (Coste et al. 2023,
    arXiv:2310.02743; there of the variance). 0: the mean."""
