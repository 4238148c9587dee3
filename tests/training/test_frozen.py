"""optim.frozen: what is frozen stays as it is, whatever the layout, and the rest trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import Config, MoeConfig, OptimConfig
from parallel.env import World
from parallel.freezing import frozen_names
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import tensors_in
from tests.training.helpers import rows, tiny_config, train, trajectory, with_layout, write_corpus
from training.frozen import Frozen, frozen_parameters
from training.memory_estimate import Memory, memory_per_rank

NAMES = ["embedding.weight", "layers.0.attention.qkv.weight", "layers.1.ffn.router.weight", "layers.1.ffn.experts.w_in"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("frozen"))


def config_of(corpus: Path, run_dir: Path, frozen: list[str], **settings: Any) -> Config:
    config = tiny_config(corpus, run_dir, steps=4)
    config.model = replace(config.model, moe=MoeConfig(num_experts=4, every=2, top_k=2), **settings)
    config.optim = replace(config.optim, frozen=frozen)
    config.checkpoint = replace(config.checkpoint, every=2, keep=5)
    return config


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    found = tensors_in(run_dir / "checkpoints" / f"step_{step:08d}")
    return {k.removeprefix("weights."): v for k, v in found.items() if k.startswith("weights.")}


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (["*", "!*.router.*"], {"layers.1.ffn.router.weight"}),
        (["*", "!*.experts.*"], {"layers.1.ffn.experts.w_in", "layers.1.ffn.experts.w_out"}),
        (["layers.*", "embedding.weight"], {"final_norm.weight", "head.weight"}),
    ],
)
def test_frozen_parameters_stay_and_the_others_train(
    frozen: list[str], trained: set[str], corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(1, train, config_of(corpus, tmp_path / "run", frozen), timeout=120.0) == [0]
    before, after = weights(tmp_path / "run", 2), weights(tmp_path / "run", 4)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    moments = tensors_in(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert {name.removeprefix("exp_avg.") for name in moments if name.startswith("exp_avg.")} == trained


def test_gradients_of_what_trains_are_those_of_the_whole_model(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """The first update of the head is the same whether the layers below it are frozen or not."""
    for name, frozen in {"all": [], "head": ["*", "!head.weight"]}.items():
        config = config_of(corpus, tmp_path / name, frozen)
        config.optim = replace(config.optim, clip_grad=0.0)
        config.train = replace(config.train, steps=1)
        assert ranks.run(1, train, config, timeout=120.0) == [0]
    alone, whole = (weights(tmp_path / name, 1)["head.weight"] for name in ("head", "all"))
    assert torch.equal(alone, whole)


@pytest.mark.parametrize(
    ("frozen", "layout"),
    [
        (["*", "!*.router.*"], {"tp": 2, "sequence_parallel": True, "ep": 2}),
        (["*", "!*.router.*"], {"pp": 2}),  # the first stage trains nothing
        (["embedding.weight", "layers.0.*"], {"pp": 2, "ep": 2}),
        (["*", "!*.experts.*"], {"ep": 2, "etp": 2}),
    ],
)
@pytest.mark.parametrize("recompute", [[], ["full"]])
def test_every_layout_trains_the_same(
    frozen: list[str], layout: dict[str, Any], recompute: list[str], corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    losses = []
    for name, degrees in {"one": {}, "many": layout}.items():
        config = with_layout(config_of(corpus, tmp_path / name, frozen, recompute=recompute), **degrees)
        config.optim = replace(config.optim, clip_grad=0.01)  # clipping, too, is over what trains
        size = 1 if name == "one" else 4
        assert ranks.run(size, train, config, timeout=180.0) == [0] * size
        losses.append([(row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)])
    for one, many in zip(*losses, strict=True):
        assert many == pytest.approx(one, rel=1e-5)


def test_a_run_resumes_as_if_it_had_not_stopped(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    frozen = ["*", "!*.experts.*"]
    for name, stops in {"through": [None], "stopped": [2, None]}.items():
        for stop in stops:
            config = config_of(corpus, tmp_path / name, frozen)
            config.train = replace(config.train, stop_after=stop)
            assert ranks.run(1, train, config, timeout=120.0)[0] in (0, 75)
    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "through")


def test_a_change_at_a_resume_is_refused(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, train, config_of(corpus, tmp_path / "run", ["embedding.weight"]), timeout=120.0) == [0]
    with pytest.raises(Exception, match=r"optimizer states of other parameters \(optim.frozen: "):
        ranks.run(1, train, config_of(corpus, tmp_path / "run", []), timeout=120.0)


def test_tied_embeddings_on_two_stages(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    losses = []
    for size in (1, 2):
        config = config_of(corpus, tmp_path / str(size), ["embedding.weight"], tie_embeddings=True)
        config = with_layout(config, pp=size)
        assert ranks.run(size, train, config, timeout=120.0) == [0] * size
        losses.append([row["loss"] for row in rows(tmp_path / str(size))])
        before, after = weights(tmp_path / str(size), 2), weights(tmp_path / str(size), 4)
        assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_last_pattern_that_matches_decides() -> None:
    assert frozen_names(["layers.*"], NAMES) == set(NAMES[1:])
    assert frozen_names(["*", "!layers.1.*"], NAMES) == set(NAMES[:2])
    assert frozen_names(["*", "!layers.1.*", "*.router.*"], NAMES) == set(NAMES[:3])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\*.routr.\* matches no parameter; there are .*layers.\*.ffn.router.weight"):
        frozen_names(["*.routr.*"], NAMES)
    with pytest.raises(ValueError, match=r"matches every parameter; exempt some"):
        frozen_names(["*"], NAMES)


def memory_of(world: World, config: Config) -> tuple[Frozen, Memory, Memory]:
    """In a process in which no ranks have met (rank function for the pool)."""
    whole = replace(config, optim=OptimConfig())
    memory = [memory_per_rank(c, Layout(1), bf16=True) for c in (config, whole)]
    return frozen_parameters(config), memory[0], memory[1]


def test_memory_has_no_gradients_and_states_of_frozen_parameters(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path / "run", ["*", "!*.experts.*"])
    (answer,) = ranks.run(1, memory_of, config, timeout=60.0)
    frozen, memory, whole = answer
    experts = 4 * 3 * 32 * 48
    assert (frozen.trained, frozen.dense_share, frozen.expert_share) == (experts, 0.0, 1.0)
    assert (memory.gradients, memory.optimizer) == (4.0 * experts, 12.0 * experts)
    assert memory.weights == whole.weights and memory.gradients < whole.gradients
    # Muon keeps one tensor less of each matrix that is trained.
    for patterns in (["*", "!*.experts.*"], ["embedding.weight", "layers.0.*"]):
        config.optim = replace(config.optim, frozen=patterns, name="adamw")
        (answer,) = ranks.run(1, memory_of, config, timeout=60.0)
        config.optim = replace(config.optim, name="muon")
        (by_muon,) = ranks.run(1, memory_of, config, timeout=60.0)
        attention = 32 * (config.model.query_width * 2 + config.model.key_width * 2)
        matrices = experts + (attention if "layers.0.*" in patterns else 0)
        assert answer[1].optimizer - by_muon[1].optimizer == pytest.approx(4.0 * matrices)
