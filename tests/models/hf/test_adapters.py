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
from parallel import checkpoint_manifest
from parallel.local_launcher import RankPool
from tests.models.hf.conftest import Runs
from tests.models.hf.helpers import run_export
from training.adapters import as_base
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
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) / 6 for name, shape in shapes.items()}
    directory = folder / "checkpoints" / "step_00000000"
    write_step(directory, {n: (torch.float32, s) for n, s in shapes.items()}, lambda name: iter([values[name]]))
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | {"base": as_base(base / "checkpoints" / "step_00000000").as_json()}
    path.write_text(json.dumps(manifest | {"digest": checkpoint_manifest._digest_of(manifest)}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adds_the_adapters_that_we_do(family: str, runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = with_adapters(runs[family], tmp_path / "lora", rslora=family == "mixtral")
    code, said = run_export(ranks, lora, tmp_path / "adapter", adapter=True)
    assert code == 0 and "verified on" in said, said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", EXPERTS_TOGETHER)
def test_where_peft_has_no_form_the_merged_model_is_named(
    family: str, runs: Runs, ranks: RankPool, tmp_path: Path
) -> None:
    lora = with_adapters(runs[family], tmp_path / "lora")
    code, said = run_export(ranks, lora, tmp_path / "adapter", adapter=True)
    assert code == 2 and f"{family} of Transformers keeps experts" in said.replace("_text", "") and "merge=true" in said
    assert run_export(ranks, lora, tmp_path / "merged", merge=True)[0] == 0
