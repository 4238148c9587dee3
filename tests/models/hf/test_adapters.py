"""Adapters of imported models in peft: the command compares the logits of both."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conf.lora_layers import adapted_layers
from conf.schema import LoraConfig
from models.hf.convert import write_step
from parallel.local_launcher import RankPool
from tests.models.hf.conftest import Runs
from tests.models.hf.helpers import run_export, run_import, tensors_in
from training.adapters import as_base
from training.hf_runs import STEP
from training.run_dir import load_config

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "minimax_m2", "qwen2_moe")
EXPERTS_TOGETHER = ("gpt_oss", "granitemoe", "llama4")


def with_adapters(base: Path, folder: Path, **lora: Any) -> Path:
    """A run with random adapters of all layers, as training would write it."""
    run = load_config(base)
    run = dataclasses.replace(run, lora=LoraConfig(**{"rank": 3, "alpha": 6.0, **lora}))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(run), sort_keys=False))
    for name in ("tokenizer.json",):
        (folder / name).write_bytes((base / name).read_bytes())
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapted_layers(run.model, run.lora):
        a, b = (run.lora.rank or 0, layer.inner), (layer.outer, run.lora.rank or 0)
        experts = (layer.experts,)
        shapes[layer.parameter("a")] = (*experts, *a[::-1]) if layer.experts else a
        shapes[layer.parameter("b")] = (*experts, *b[::-1]) if layer.experts else b
        if run.lora.dora:
            shapes[layer.parameter("m")] = (layer.outer,)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) / 6 for name, shape in shapes.items()}
    kinds = {name: (torch.float32, shape) for name, shape in shapes.items()}
    recorded = as_base(base / STEP).as_json()
    write_step(folder / STEP, kinds, lambda name: iter([values[name]]), base=recorded)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adds_the_adapters_that_we_do(family: str, runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = with_adapters(runs[family], tmp_path / "lora", rslora=family == "mixtral")
    code, said = run_export(ranks, lora, tmp_path / "adapter", adapter=True)
    assert code == 0 and "verified on" in said, said
    if family in ("mixtral", "deepseek_v3"):  # and back
        code, said = run_import(ranks, runs[family], tmp_path / "again", adapter=str(tmp_path / "adapter"))
        assert code == 0 and "verified on" in said, said
        ours, theirs = tensors_in(tmp_path / "again" / STEP), tensors_in(lora / STEP)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3"])
def test_peft_scales_rows_as_we_do(family: str, runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    """DoRA, by the adapters and merged."""
    pytest.importorskip("peft")
    target = ["*"] if family == "qwen3" else ["*.attention.*"]
    lora = with_adapters(runs[family], tmp_path / "lora", dora=True, target=target)
    for what in ({"adapter": True}, {"merge": True}):
        code, said = run_export(ranks, lora, tmp_path / next(iter(what)), **what)
        assert code == 0 and "verified on" in said, said
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] and any("magnitude" in name for name in tensors_in(tmp_path / "adapter"))


def test_an_adapter_of_peft_becomes_a_run(runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    """Made by peft itself, with other ranks and scales of some layers, and one A for gate and up."""
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(runs.sources["mixtral"])
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"o_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
    )
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    code, said = run_import(ranks, runs["mixtral"], tmp_path / "ours", adapter=str(tmp_path / "theirs"))
    assert code == 0 and "verified on" in said, said
    lora = load_config(tmp_path / "ours").lora
    assert lora.rank == 4 and {name.split(".", 2)[2] for name in lora.target} == {
        *("attention.q", "attention.out", "ffn.experts.gate", "ffn.experts.up", "ffn.experts.down")
    }
    theirs = tmp_path / "theirs" / "adapter_config.json"
    theirs.write_text(theirs.read_text().replace('"use_dora": false', '"use_dora": true'))
    code, said = run_import(ranks, runs["mixtral"], tmp_path / "no", adapter=str(tmp_path / "theirs"))
    assert code == 2 and "use_dora=True is not implemented" in said


@pytest.mark.parametrize("family", EXPERTS_TOGETHER)
def test_where_peft_has_no_form_the_merged_model_is_named(
    family: str, runs: Runs, ranks: RankPool, tmp_path: Path
) -> None:
    lora = with_adapters(runs[family], tmp_path / "lora")
    code, said = run_export(ranks, lora, tmp_path / "adapter", adapter=True)
    assert code == 2 and f"{family} of Transformers keeps experts" in said.replace("_text", "") and "merge=true" in said
    assert run_export(ranks, lora, tmp_path / "merged", merge=True)[0] == 0
