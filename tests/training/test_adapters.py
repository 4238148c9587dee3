"""Runs that train adapters: what their checkpoints hold, how they resume, and what other programs make of them."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conf.commands import EvaluateConfig, GenerateConfig, UpcycleConfig
from conf.lora_layers import is_adapter
from conf.schema import CheckpointConfig, Config, LoraConfig, MoeConfig, OptimConfig, RunConfig
from launch.evaluate import evaluate_rank
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import in_rank, run_export, tensors_in
from tests.training.helpers import tiny_config, train, trajectory, with_layout, write_corpus
from training.adapters import as_base, base_of
from training.initial_weights import data_settings
from training.run_dir import open_run_dir

SECONDS = 240.0


@dataclass(frozen=True)
class Runs:
    corpus: Path
    base: Path
    config: Config
    """Of the adapters' run."""
    lora: Path


def _config(base: Config, folder: Path, **lora: Any) -> Config:
    return replace(
        base,
        run=RunConfig(dir=str(folder)),
        lora=LoraConfig(**{"rank": 4, "dropout": 0.1, **lora}),
        checkpoint=CheckpointConfig(every=2, keep=9, load=base.run.dir),
        train=replace(base.train, steps=4),
        optim=OptimConfig(lr=2e-2, warmup_steps=0),
    )


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("adapters")
    corpus = write_corpus(folder)
    base = tiny_config(corpus, folder / "base", steps=2)
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, eval_capacity_factor=None, backend="loop")
    base.model = replace(base.model, num_attention_heads=4, num_query_groups=2, moe=moe)
    base.eval = replace(base.eval, sample_tokens=0, final_batches=1)
    assert ranks.run(1, train, base, timeout=SECONDS) == [0]
    config = _config(base, folder / "lora")
    assert ranks.run(1, train, config, timeout=SECONDS) == [0]
    return Runs(corpus, folder / "base", config, folder / "lora")


def _step(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def test_a_checkpoint_holds_adapters_alone_and_names_its_base(runs: Runs) -> None:
    found = tensors_in(_step(runs.lora, 4))
    weights = {name.removeprefix("weights.") for name in found if name.startswith("weights.")}
    assert weights and all(is_adapter(name) or name.endswith(".last_load") for name in weights)
    trained = {name for name in weights if is_adapter(name)}
    assert {name.removeprefix("exp_avg.") for name in found if name.startswith("exp_avg.")} == trained
    assert {name.split(".lora.")[1].split(".")[0] for name in trained} == {"q", "k", "v", "out", "gate", "up", "down"}
    assert all(found[f"weights.{name}"].abs().max() > 0 for name in trained)
    base = base_of(_step(runs.lora, 4))
    assert base is not None and base == as_base(_step(runs.base, 2))
    assert base.digest == json.loads((_step(runs.base, 2) / "manifest.json").read_text())["digest"]


@pytest.mark.parametrize(
    "degrees", [{}, {"tp": 2, "sequence_parallel": True, "etp": 2}], ids=["one rank", "tp and etp"]
)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(
    degrees: dict[str, Any], runs: Runs, ranks: RankPool, tmp_path: Path
) -> None:
    shutil.copytree(runs.lora, tmp_path / "lora")
    shutil.rmtree(_step(tmp_path / "lora", 4))
    config = with_layout(replace(runs.config, run=RunConfig(dir=str(tmp_path / "lora"))), **degrees)
    world = 2 if degrees else 1
    assert ranks.run(world, train, config, timeout=SECONDS) == [0] * world
    ours, theirs = trajectory(tmp_path / "lora"), trajectory(runs.lora)
    weights, wanted = tensors_in(_step(tmp_path / "lora", 4)), tensors_in(_step(runs.lora, 4))
    if degrees:
        assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=1e-5)
    else:
        assert ours == theirs
        assert all(torch.equal(weights[n], wanted[n]) for n in wanted if not n.startswith("random"))


def test_the_wrong_base_or_other_adapters_are_refused(runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs.base, other)
    manifest = _step(other, 2) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"digest": "0" * 32}))

    def refusal(config: Config) -> str:
        with pytest.raises(ValueError) as error:
            open_run_dir(config)
            data_settings(config, None)
        return str(error.value)

    def loading(path: Path | None) -> Config:
        load = None if path is None else str(path)
        return replace(runs.config, checkpoint=replace(runs.config.checkpoint, load=load))

    said = refusal(loading(other))
    assert str(_step(other, 2)) in said and str(_step(runs.base, 2)) in said and "checkpoint.load=" in said
    assert "needs checkpoint.load" in refusal(loading(None))
    fresh = replace(loading(runs.lora), run=RunConfig(dir=str(tmp_path / "fresh")))
    assert "holds adapters, which have no adapters of their own" in refusal(fresh)
    for lora in (LoraConfig(8), LoraConfig(), replace(runs.config.lora, target=["*.attention.*"])):
        assert "has other adapters, or none" in refusal(replace(runs.config, lora=lora))


@pytest.mark.parametrize("what", [{"adapter": True}, {"merge": True}, {"merge": True, "dtype": "bf16"}])
def test_exports_compute_what_the_run_does(what: dict[str, Any], runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    """With Transformers and peft: the commands compare the logits themselves."""
    pytest.importorskip("peft")
    code, said = run_export(ranks, runs.lora, tmp_path / "out", **what)
    assert code == 0 and "verified on" in said, said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= ({"adapter_config.json", "adapter_model.safetensors"} if "adapter" in what else {"config.json"})
    assert names.isdisjoint({"base", "merged", "reference.safetensors"})


def test_an_export_of_the_wrong_scale_is_found(runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    wrong = tmp_path / "lora"
    shutil.copytree(runs.lora, wrong)
    assert ranks.run(1, in_rank, _export_with_half_the_scale, (wrong, tmp_path / "out"), timeout=SECONDS)[0][0] == 1
    assert not (tmp_path / "out").exists()


def _export_with_half_the_scale(paths: tuple[Path, Path]) -> int:
    from conf.commands import ExportConfig
    from training import hf_adapter
    from training.hf_export import export_model

    config = ExportConfig(checkpoint=str(paths[0]), output=str(paths[1]), adapter=True)
    with mock.patch.object(hf_adapter, "scale_of", lambda lora: lora.alpha / lora.rank / 2):
        return export_model(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "adapter=true writes them for peft, and merge=true"),
        ({"merge": True, "adapter": True}, "choose one"),
        ({"adapter": True, "dtype": "bf16"}, "nearest: dtype=stored"),
    ],
)
def test_an_export_asks_what_to_do_with_adapters(
    settings: dict[str, Any], said: str, runs: Runs, ranks: RankPool, tmp_path: Path
) -> None:
    code, message = run_export(ranks, runs.lora, tmp_path / "out", **settings)
    assert code == 2 and said in message


def test_adapters_need_a_run_that_has_some(runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    code, message = run_export(ranks, runs.base, tmp_path / "out", merge=True)
    assert code == 2 and "needs a run with adapters" in message


def test_other_commands_load_the_base_too(runs: Runs, ranks: RankPool) -> None:
    base, lora = (ranks.run(1, _evaluate, str(path), timeout=SECONDS)[0] for path in (runs.base, runs.lora))
    assert lora["val_loss"] < base["val_loss"] - 0.05  # it has learned, and is not the base alone
    row = [json.loads(line) for line in (runs.lora / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["val_loss"] == pytest.approx(lora["val_loss"], rel=1e-6)
    assert len(ranks.run(1, _generate, str(runs.lora), timeout=SECONDS)[0]) > len("The cat\n")


def _evaluate(world: World, path: str) -> dict[str, float]:
    found: list[dict[str, float]] = []
    with mock.patch("training.console.Console.held_out", lambda _, row, *__: found.append(row)):
        evaluate_rank(world, EvaluateConfig(checkpoint=path, batches=1, precision="fp32"))
    return found[0]


def _generate(world: World, path: str) -> str:
    from launch import generate

    written: list[str] = []
    with mock.patch.object(generate, "print", lambda text="\n", **_: written.append(text), create=True):
        generate.main(GenerateConfig(checkpoint=path, prompt="The cat", max_tokens=4, precision="fp32"))
    return "".join(written)


def test_upcycling_copies_the_merged_layers(runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    """The command itself compares the sparse model with the adapters' run."""
    base = tiny_config(runs.corpus, tmp_path / "base", steps=1)
    base.model = replace(base.model, moe=MoeConfig())
    base.eval = replace(base.eval, sample_tokens=0, final_batches=1)
    lora = _config(base, tmp_path / "lora", target=["*.ffn.*"], rslora=True)
    assert [ranks.run(1, train, config, timeout=SECONDS) for config in (base, lora)] == [[0], [0]]
    config = UpcycleConfig(checkpoint=str(tmp_path / "lora"), output=str(tmp_path / "sparse"), num_experts=2, top_k=2)
    code, said = ranks.run(1, in_rank, _upcycle, config, timeout=SECONDS)[0]
    assert code == 0 and "verified on" in said, said
    assert "rank: null" in (tmp_path / "sparse" / "config.yaml").read_text()


def _upcycle(config: UpcycleConfig) -> int:
    from training.upcycle import upcycle

    return upcycle(config)
