"""Objectives on preferences, by the recipe of CONTRIBUTING.md."""

import math

import pytest
import torch

from conf import rules
from conf.schema import Config, DataConfig, PreferenceConfig, TrainConfig
from models.objectives import OBJECTIVES, ObjectiveKind, objective_of
from tests.extensions.recipes import follow
from tests.models.test_objectives import LENGTHS, PROMPTS, S


def test_an_objective(runtime) -> None:
    """SimPO by hand."""
    config = Config(data=DataConfig(kind="preference", files=["x"]), train=TrainConfig(objective="simpo"))
    config.preference = PreferenceConfig(beta=2.0)
    with pytest.raises(ValueError, match=r"train\.objective is one of language_modeling, dpo, reward, but simpo"):
        rules.check(config, 1)
    follow("An objective on preferences")
    rules.check(config, 1)
    losses_BS = torch.rand(len(LENGTHS), S, generator=torch.Generator().manual_seed(1))
    at, length, prompt = torch.arange(S), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    batch = {"loss_mask": ((at >= prompt - 1) & (at < length - 1)).float()}
    objective = objective_of("simpo", config.preference)
    got, metrics, counts = objective.terms(losses_BS, batch, runtime.groups.cp)
    means = [
        -2.0 * sum(losses_BS[i, j].item() for j in range(first - 1, end - 1)) / (end - first)
        for i, (first, end) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    wanted = [math.log1p(math.exp(means[i + 1] - means[i])) for i in range(0, len(means), 2)]
    assert got.tolist() == pytest.approx(wanted, rel=1e-6) and counts.all()
    assert metrics[:, 0].tolist() == pytest.approx(means[::2], rel=1e-6)


def test_metrics_are_those_that_the_log_has() -> None:
    class Other:
        metrics = ("rewards_chosen", "surprise")

        def __init__(self, settings: PreferenceConfig):
            pass

    with pytest.raises(ValueError, match=r"metrics\.jsonl has no surprise"):
        OBJECTIVES.add(ObjectiveKind("other", Other))
    with pytest.raises(ValueError, match="there is a objective dpo already"):
        OBJECTIVES.add(ObjectiveKind("dpo", Other))
