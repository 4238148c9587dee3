"""A sparse model from a dense one computes what the dense one does, and trains on."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.commands import UpcycleConfig
from conf.schema import MoeConfig
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import Outcome, in_rank, tensors_in
from tests.training.helpers import rows, tiny_config, train, write_corpus
from training.run_dir import load_config


@pytest.fixture(scope="module")
def dense(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two trained dense runs, by activation, and the corpus."""
    folder = tmp_path_factory.mktemp("dense")
    found = {"corpus": write_corpus(folder)}
    for activation in ("swiglu", "relu2"):
        config = tiny_config(found["corpus"], folder / activation, steps=3)
        config.model = replace(config.model, moe=MoeConfig(num_experts=0), activation=activation, init_scale=1.0)
        config.model.mtp_num_layers = int(activation == "relu2")
        config.optim = replace(config.optim, lr=0.03)
        assert ranks.run(1, train, config, timeout=120.0) == [0]
        found[activation] = folder / activation
    return found


def _upcycle(config: UpcycleConfig) -> int:
    from training.upcycle import upcycle

    return upcycle(config)


def run_upcycle(ranks: RankPool, source: Path, output: Path, **settings: Any) -> Outcome:
    config = UpcycleConfig(checkpoint=str(source), output=str(output), **settings)
    return ranks.run(1, in_rank, _upcycle, config, timeout=120.0)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 4},
        {"num_experts": 3, "top_k": 3, "every": 2},
        {"num_experts": 8, "top_k": 4, "granularity": 2},
        {"num_experts": 6, "top_k": 3, "granularity": 3, "first_dense_layers": 1},
    ],
)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_copies_compute_what_the_dense_layer_does(
    activation: str, settings: dict[str, Any], dense: dict[str, Path], ranks: RankPool, tmp_path: Path
) -> None:
    code, printed = run_upcycle(ranks, dense[activation], tmp_path / "sparse", **settings)
    assert code == 0 and "verified on" in printed, printed
    model = load_config(tmp_path / "sparse").model
    assert (model.moe.num_experts, model.moe.top_k) == (settings["num_experts"], settings.get("top_k", 2))
    assert model.expert_width * settings.get("granularity", 1) == 48


def test_the_comparison_finds_a_wrong_scale(dense: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    code, printed = ranks.run(1, _with_wrong_scale, str(dense["swiglu"]), str(tmp_path / "out"), timeout=120.0)[0]
    assert code == 1 and "NOT THE SAME" in printed and "output of layer 0: differs by" in printed
    assert not (tmp_path / "out").exists()


def _with_wrong_scale(world: Any, source: str, output: str) -> Outcome:
    from unittest import mock

    from training import upcycle, upcycle_weights

    config = UpcycleConfig(checkpoint=source, output=output, num_experts=4, granularity=2)
    with mock.patch.object(upcycle_weights, "output_scale", lambda *_: 1.0):
        return in_rank(world, upcycle.upcycle, config)


def test_without_equal_gates_the_output_is_right_on_average(
    dense: dict[str, Path], ranks: RankPool, tmp_path: Path
) -> None:
    """Scores that are not renormalised are 1 / num_experts on average: nothing is promised, and it is said."""
    settings = {"num_experts": 8, "top_k": 2, "granularity": 2, "renormalize": False}
    code, printed = run_upcycle(ranks, dense["relu2"], tmp_path / "sparse", **settings)
    assert code == 0 and "not equal to the dense one: the gates of a token do not add up to 1" in printed
    before = tensors_in(next((dense["relu2"] / "checkpoints").glob("step_*3")))["weights.layers.0.ffn.down.weight"]
    after = tensors_in(tmp_path / "sparse" / "checkpoints" / "step_00000000")["weights.layers.0.ffn.experts.w_out"]
    # E N / K = 8 of the dense layer's weights, in two experts of half its width each; four such copies.
    torch.testing.assert_close(after.unflatten(0, (4, 2)).flatten(1, 2), (8.0 * before.t()).expand(4, -1, -1))


def test_noise_tells_the_copies_apart(dense: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    code, printed = run_upcycle(ranks, dense["swiglu"], tmp_path / "sparse", num_experts=4, noise=0.1)
    assert code == 0 and "noise was added" in printed
    w_EDGF = tensors_in(tmp_path / "sparse" / "checkpoints" / "step_00000000")["weights.layers.1.ffn.experts.w_in"]
    mean_DGF = w_EDGF.mean(0)
    relative = ((w_EDGF - mean_DGF).std() / mean_DGF.std()).item()
    assert 0.07 < relative < 0.1  # of four draws their mean takes 1/4 of the variance


def test_the_experts_of_a_copy_share_their_router_rows(dense: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    run_upcycle(ranks, dense["swiglu"], tmp_path / "sparse", num_experts=6, top_k=2, granularity=2, verify=False)
    tensors = tensors_in(tmp_path / "sparse" / "checkpoints" / "step_00000000")
    rows_ED = tensors["weights.layers.0.ffn.router.weight"]
    assert torch.equal(rows_ED[::2], rows_ED[1::2]) and len({tuple(row) for row in rows_ED.tolist()}) == 3
    assert not torch.equal(rows_ED, tensors["weights.layers.1.ffn.router.weight"])


def test_it_trains_on(dense: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    """The first loss is the dense model's next one: with the same data, dense and sparse agree before any update."""
    assert run_upcycle(ranks, dense["swiglu"], tmp_path / "sparse", num_experts=4, verify=False)[0] == 0
    losses = {}
    for name, load in {"dense": dense["swiglu"], "sparse": tmp_path / "sparse"}.items():
        config = tiny_config(dense["corpus"], tmp_path / f"on_{name}", steps=2)
        config.model, config.checkpoint.load = load_config(load).model, str(load)
        assert ranks.run(1, train, config, timeout=120.0) == [0]
        losses[name] = [row["loss"] for row in rows(tmp_path / f"on_{name}")]
    assert losses["sparse"][0] == pytest.approx(losses["dense"][0], rel=1e-6)
    assert losses["sparse"][1] < losses["sparse"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": 5}, r"granularity=5 must divide ffn_hidden_size=48; nearest: 4"),
        ({"granularity": 3, "top_k": 3}, r"num_experts=8 must be a multiple of granularity=3; nearest: num_experts=9"),
        ({"granularity": 4, "top_k": 6}, r"top_k=6 must be a multiple of granularity=4; nearest: top_k=8"),
        ({"noise": -1.0}, r"noise=-1.0 must be >= 0"),
        ({"top_k": 9}, r"nearest: model.moe.top_k=8 or model.moe.num_experts=9"),
        ({"top_k": 1, "renormalize": True}, r"model.moe.renormalize needs model.moe.top_k > 1"),
        ({"precision": "fp8"}, r"precision=fp8 is not one of fp32, bf16"),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any], message: str, dense: dict[str, Path], ranks: RankPool, tmp_path: Path
) -> None:
    code, printed = run_upcycle(ranks, dense["swiglu"], tmp_path / "sparse", **settings)
    assert code == 2
    assert re.search(message, printed)
    assert not (tmp_path / "sparse").exists()


def test_a_sparse_model_is_refused(dense: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    assert run_upcycle(ranks, dense["swiglu"], tmp_path / "sparse", verify=False)[0] == 0
    code, message = run_upcycle(ranks, tmp_path / "sparse", tmp_path / "again")
    assert code == 2 and "is of a sparse model; upcycling takes a dense one" in message
