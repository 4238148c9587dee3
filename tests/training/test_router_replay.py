"""launch.evaluate records the routing of the held-out text and replays it, under other layouts too."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.commands import EvaluateConfig
from conf.schema import MoeConfig, ParallelConfig
from moe.router_replay import RecordedRouting
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import tiny_config, train, write_corpus
from tests.training.test_evaluate_elsewhere import HERE, command_of_rank

LIMIT = 300.0


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps on one rank."""
    folder = tmp_path_factory.mktemp("replay")
    config = tiny_config(write_corpus(folder), folder / "run", steps=2)
    config.model.num_layers = 4
    config.model.moe = MoeConfig(num_experts=4, top_k=2, every=2, eval_capacity_factor=0.75)
    config.eval.sample_tokens = 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return folder / "run"


def loss(ranks: RankPool, trained: Path, size: int, degrees: dict[str, Any], **settings: Any) -> float:
    """The held-out loss that a rank of launch.evaluate finds."""
    asked = EvaluateConfig(checkpoint=str(trained), batches=3, parallel=ParallelConfig(**degrees), **HERE, **settings)
    return ranks.run(size, command_of_rank, "evaluate", asked, timeout=LIMIT)[0][1][0]


def test_a_routing_is_replayed_under_other_layouts(ranks: RankPool, trained: Path) -> None:
    first, second = str(trained / "first.safetensors"), str(trained / "second.safetensors")
    scattered = {"tp": 2, "sequence_parallel": True}
    free = loss(ranks, trained, 1, {}, record_routing=first, record_routing_weights=True)
    assert loss(ranks, trained, 1, {}, replay_routing=first) == free
    assert loss(ranks, trained, 2, scattered, record_routing=second) == pytest.approx(free, rel=1e-6)
    one, two = RecordedRouting.read(Path(first)), RecordedRouting.read(Path(second))
    assert torch.equal(one.experts_NSLK, two.experts_NSLK) and torch.equal(one.tokens_NS, two.tokens_NS)
    assert one.layers == [1, 3] and one.num_experts == 4 and one.experts_NSLK.shape == (24, 32, 2, 2)
    assert two.weights_NSLK is None and one.weights_NSLK is not None
    there = one.experts_NSLK < 4
    assert one.kept_NSLK is not None and torch.equal(one.kept_NSLK, two.kept_NSLK)
    assert 0 < one.kept_NSLK.sum() < there.sum() and not one.kept_NSLK[~there].any()
    assert torch.allclose(one.weights_NSLK.where(there, 0).sum(-1), there[..., 0].float())

    # Other experts than the router's, and other drops than the capacity's: a loss of their own, and the same one under
    # every layout.
    other = dataclasses.replace(
        one,
        experts_NSLK=((one.experts_NSLK + 1) % 4).where(there, one.experts_NSLK),
        kept_NSLK=there & (torch.arange(32)[:, None, None] % 8 == 0),
    )
    found = []
    for kept in (one.kept_NSLK, other.kept_NSLK):
        dataclasses.replace(other, kept_NSLK=kept).save(Path(second))
        found.append(loss(ranks, trained, 1, {}, replay_routing=second))
    assert abs(found[0] - free) > 1e-4 * free and abs(found[1] - found[0]) > 1e-4 * free
    forced = found[1]
    for size, degrees in ((2, scattered), (2, {"pp": 2}), (2, {})):
        assert loss(ranks, trained, size, degrees, replay_routing=second) == pytest.approx(forced, rel=1e-6)
        if degrees == {"pp": 2}:
            again = str(trained / "third.safetensors")
            loss(ranks, trained, size, degrees, replay_routing=second, record_routing=again)
            third = RecordedRouting.read(Path(again))
            assert torch.equal(third.experts_NSLK, other.experts_NSLK)
            assert third.kept_NSLK is not None and torch.equal(third.kept_NSLK, other.kept_NSLK)


def refusals(world: World, all_settings: list[EvaluateConfig]) -> list[str]:
    """The message of each evaluation (rank function)."""
    from launch.evaluate import evaluate_rank

    messages = []
    for settings in all_settings:
        with pytest.raises(ValueError) as error:
            evaluate_rank(world, settings)
        messages.append(str(error.value))
    return messages


def test_a_file_that_is_not_of_the_model_or_the_text_is_named(ranks: RankPool, trained: Path) -> None:
    experts = torch.zeros(24, 32, 2, 2, dtype=torch.int16)
    experts[..., 1] = 1
    good = RecordedRouting(experts, torch.zeros(24, 32, dtype=torch.int32), [1, 3], 4)
    cases = {
        "has the routing of 2 windows of the text, and ": {
            "experts_NSLK": experts[:2],
            "tokens_NS": good.tokens_NS[:2],
        },
        "was recorded on other tokens, first in window 0": {},
        "recorded with model.moe.num_experts 8, and this model has 4": {"num_experts": 8},
        "recorded with model.moe.top_k 1, and this model has 2": {"experts_NSLK": experts[..., :1]},
        "recorded with sparse layers [0, 1], and this model has [1, 3]": {"layers": [0, 1]},
        "with train.sequence_length 31, and this model has 32": {
            "experts_NSLK": experts[:, :31],
            "tokens_NS": good.tokens_NS[:, :31],
        },
        "1 sparse layers, but the model's batch has 2": {"experts_NSLK": experts[:, :, :1]},
        "to one expert twice: [0, 0]": {"experts_NSLK": torch.zeros_like(experts)},
        "routing_kept is [24, 32, 2, 1]": {"kept_NSLK": experts[..., :1] > 0},
        "layer 1 to expert 5, but model.moe.num_experts=4": {"experts_NSLK": experts + 5},
    }
    settings = []
    for number, changes in enumerate(cases.values()):
        path = trained / f"wrong{number}.safetensors"
        dataclasses.replace(good, **changes).save(path)
        settings.append(path)
    text = trained / "text.safetensors"
    text.write_text("no tensors")
    paths = [*settings, text, trained / "nowhere.safetensors", *trained.glob("checkpoints/*/*.safetensors")][:13]
    wanted = [*cases, "cannot be read as a safetensors file", "does not exist", "is not a recorded routing"]
    asked = [EvaluateConfig(checkpoint=str(trained), replay_routing=str(path), batches=3, **HERE) for path in paths]
    (messages,) = ranks.run(1, refusals, asked, timeout=LIMIT)
    assert len(messages) == len(wanted)
    for message, part in zip(messages, wanted, strict=True):
        assert part in message and "\n" not in message
