"""Which settings of a model may change between the checkpoint and the run that goes on from it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conf.commands import InferenceConfig
from conf.schema import Config
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import rows, tiny_config, train, write_corpus
from training.compatibility import describe_changes, flatten, model_differences, overrides_to_restore
from training.load_checkpoint import load_model

LIMIT = 120.0


def changed(before: dict[str, Any] | None = None, **after: Any) -> list[str]:
    """The settings of the model that may not change so, written `moe__top_k` for model.moe.top_k."""
    old, new = ({"model": dataclasses.asdict(Config().model)} for _ in range(2))
    for settings, values in ((old, {"moe__num_experts": 4, **(before or {})}), (new, {"moe__num_experts": 4, **after})):
        for key, value in values.items():
            section = settings["model"]["moe"] if "__" in key else settings["model"]
            section[key.removeprefix("moe__")] = value
    return sorted(model_differences(old, new))


@pytest.mark.parametrize(
    "after",
    [
        {"name": "other", "init_scale": 1.0, "recompute": ["moe", "norm"]},
        {"moe__capacity_factor": None, "moe__eval_capacity_factor": 1.0, "moe__drop_policy": "random"},
        {"moe__aux_loss_coeff": 0.0, "moe__z_loss_coeff": 0.0, "moe__jitter": 0.1, "moe__expert_dropout": 0.1},
        {"moe__dispatcher": "all_gather", "moe__pad_to_capacity": True, "moe__backend": "loop"},
        {"moe__expert_chunk_rows": 7, "moe__bias_update_rate": 0.1, "moe__load_balancing": "sinkhorn"},
        {"moe__ffn_hidden_size": 512, "moe__shared_ffn_hidden_size": 512},
        {"moe__bias_update_rate": 0.0, "num_query_groups": 4, "head_dim": 64, "moe__renormalize": False},
    ],
)
def test_how_it_is_computed_and_trained_may_change(after: dict[str, Any]) -> None:
    assert changed(**after) == []


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "head_dim",
        "num_query_groups",
        "qk_norm",
        "attention_bias",
        "clip_qkv",
        "rope_theta",
        "norm_eps",
        "activation",
    ],
)
def test_what_the_weights_mean_may_not(key: str) -> None:
    assert changed(**{key: "swiglu" if key == "activation" else 2}) == [f"model.{key}"]


def test_a_width_that_another_setting_gives() -> None:
    assert changed(ffn_hidden_size=64) == ["model.ffn_hidden_size"]
    assert changed(moe__ffn_hidden_size=64) == ["model.moe.ffn_hidden_size"]


def test_which_layers_have_experts() -> None:
    assert changed(moe__first_dense_layers=1) == ["model.moe.first_dense_layers"]


def test_some_changes_of_a_setting_only() -> None:
    rate, balancing = "moe__bias_update_rate", "moe__load_balancing"
    assert changed({rate: 0.01}, **{rate: 0.001}) == changed({rate: 0.01}, **{rate: 0.0}) == []
    assert changed({rate: 0.01}) == ["model.moe.bias_update_rate"]
    assert changed({rate: 0.0}) == []  # as runs of versions without null say that they have none
    assert changed({balancing: "seq_aux_loss"}, **{balancing: "global_aux_loss"}) == []
    assert changed({balancing: "expert_choice"}) == ["model.moe.load_balancing"]


def test_what_experts_do_is_nothing_where_there_are_none() -> None:
    assert (
        changed(
            {"moe__num_experts": 0, "moe__every": 2, "moe__first_dense_layers": 1}, moe__num_experts=0, moe__top_k=2
        )
        == []
    )
    assert changed({"moe__num_experts": 0}) != []


def test_settings_of_other_versions_are_left_out() -> None:
    assert model_differences({"model": {"depth": 3}}, {"model": dataclasses.asdict(Config().model)}) == {}


def test_words() -> None:
    differences = {"model.tie_embeddings": (False, True), "model.num_query_groups": (None, 2)}
    assert describe_changes(differences) == "model.tie_embeddings: false -> true; model.num_query_groups: null -> 2"
    rate = {"model.moe.bias_update_rate": (0.01, None)}
    assert overrides_to_restore(rate).startswith("model.moe.bias_update_rate=0.01 or model.moe.bias_update_rate=0, ")
    assert overrides_to_restore(differences) == "model.tie_embeddings=false model.num_query_groups=null"


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == {"a.b": 1, "a.c.d": None, "e": [2]}


def biases(world: World, run_dir: str) -> list[list[float]]:
    """Of the newest checkpoint (rank function for the pool)."""
    with load_model(run_dir, InferenceConfig(precision="fp32")) as loaded:
        (module,) = loaded.built.engine.modules
        return [p.tolist() for name, p in module.named_parameters() if name.endswith("router.bias")]


def test_a_run_goes_on_with_its_trained_bias(ranks: RankPool, tmp_path: Path) -> None:
    """Slower, held, with more recomputed; never without it."""
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=5)
    config.model.moe.bias_update_rate = 0.25
    kept = []
    for steps, rate, recompute in ((2, 0.25, []), (3, 0.125, ["moe"]), (5, 0.0, ["full"])):
        config.train.stop_after, config.model.recompute, config.model.moe.bias_update_rate = steps, recompute, rate
        assert ranks.run(1, train, config, timeout=LIMIT) == [0]
        kept += ranks.run(1, biases, config.run.dir, timeout=LIMIT)
    (first,), (second,), (third,) = kept
    assert {abs(b - a) for a, b in zip(first, second, strict=True)} <= {0.0, 0.125} and first != second
    assert third == second and len(rows(tmp_path / "run")) == 5
    assert "model.moe.bias_update_rate: 0.125 -> 0.0" in (tmp_path / "run" / "train.log").read_text()
    config.model.moe.bias_update_rate = None
    with pytest.raises(RankFailed, match=r"is of another model: not in the model: layers\.1\.\w+\.router\.bias"):
        ranks.run(1, train, config, timeout=LIMIT)
    assert "bias_update_rate: 0.0" in (tmp_path / "run" / "config.yaml").read_text()
