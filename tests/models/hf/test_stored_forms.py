"""Sources in other forms than one float tensor per weight: FP8 with scales, and experts stored together."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.hf.configuration import model_of
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import assert_same_bits, run_export, run_import, tensors_in

BLOCK = [16, 20]
"""Divides neither the number of rows nor of columns of most weights of the fixtures."""
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
Q = "model.layers.1.self_attn.q_proj.weight"


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 weight, fp32 scale per block), so that the largest value of each block is 448."""
    rows, columns = (math.ceil(n / b) for n, b in zip(weight.shape, BLOCK, strict=True))
    scale, low = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scale[i, j] = weight[block].abs().max() / 448
            low[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return low, scale


def in_float64(low: Tensor, scale: Tensor) -> Tensor:
    """Element by element, in float64."""
    exact, scales = low.double(), scale.double()
    row = torch.arange(exact.shape[0])[:, None] // BLOCK[0]
    column = torch.arange(exact.shape[1])[None] // BLOCK[1]
    return exact * scales[row, column]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], config: dict[str, Any]) -> None:
    """Replaces the tensors of a model directory, in one file, and adds to its config.json."""
    tensors = tensors_in(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))


def quantise(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "_proj.weight" in n and tensors[n].dim() == 2]:
        tensors[name], tensors[name + "_scale_inv"] = quantised(tensors[name])


@pytest.fixture(scope="module")
def fp8(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "source"
    shutil.copytree(sources["qwen3_moe"], folder)
    rewrite(folder, quantise, {"quantization_config": QUANTIZATION})
    return folder


def test_fp8_weights_are_dequantised(fp8: Path, ranks: RankPool, tmp_path: Path) -> None:
    stored = tensors_in(fp8)
    scales = [name for name in stored if name.endswith("_scale_inv")]
    assert len(scales) == 2 * 4 + 3 + 4 * 3  # attention of both layers, one dense FFN, four experts
    code, printed = run_import(ranks, fp8, tmp_path / "run")
    assert code == 0 and "verified on" in printed, printed
    assert f"{len(stored)} tensors in F32, F8_E4M3 ->" in printed, printed
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back")
    assert code == 0 and "verified on" in printed, printed
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    back = tensors_in(tmp_path / "back")
    assert back.keys() == stored.keys() - set(scales)
    for name, tensor in back.items():
        exact = in_float64(stored[name], stored[name + "_scale_inv"]) if name + "_scale_inv" in stored else stored[name]
        # The product of 4 and of 24 significant bits, rounded once.
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact.float()), name


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda t: t.pop(Q + "_scale_inv"), f"scales of FP8 weights: {Q}_scale_inv is missing"),
        (lambda t: t.update(odd_scale_inv=torch.ones(1)), "odd_scale_inv belongs to no FP8 weight"),
        (
            lambda t: t.update({Q + "_scale_inv": t[Q + "_scale_inv"].t().contiguous()}),
            f"{Q}_scale_inv is [2, 3] instead of [3, 2], for {Q} [48, 32]",
        ),
        (
            lambda t: t.update({Q + "_scale_inv": t[Q + "_scale_inv"].half()}),
            f"{Q}_scale_inv is of type F16 instead of F32 or BF16",
        ),
        (lambda t: (t.pop(Q), t.pop(Q + "_scale_inv")), f"1 missing: {Q}"),
    ],
    ids=["missing", "extra", "shape", "type", "both"],
)
def test_wrong_scales(damage: Callable, expected: str, fp8: Path, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    code, message = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 2 and expected in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_config_json_and_the_tensors_disagree(fp8: Path, sources, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path / "source")
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    code, message = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 2 and "is of type F8_E4M3, but config.json has no quantization_config" in message, message
    shutil.copytree(sources["qwen3_moe"], tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    code, message = run_import(ranks, tmp_path / "plain", tmp_path / "run")
    assert code == 2 and "but no tensor is of type F8_E4M3" in message, message


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights quantised by gptq are not supported"),
        ({"quant_method": "awq"}, "quantised by awq are not supported (only fp8 with a scale per block)"),
        ({"quant_method": "mxfp4"}, "quantization_config=Mxfp4Config(dequantize=True)), then save_pretrained"),
        ({"quant_method": "bitsandbytes"}, "model.dequantize(), then save_pretrained"),
        (QUANTIZATION | {"fmt": "e5m2"}, "quantization_config.fmt=e5m2: only e4m3"),
        (QUANTIZATION | {"activation_scheme": "static"}, "activation_scheme=static: only dynamic"),
        (QUANTIZATION | {"weight_block_size": None}, "weight_block_size=null: must be two positive integers"),
        (QUANTIZATION | {"bits": 4}, "quantization_config.bits=4: unknown key"),
        ("fp8", "quantization_config=fp8: must be an object with a quant_method"),
    ],
    ids=str,
)
def test_other_quantisations_are_refused(found: Any, expected: str) -> None:
    config = {"model_type": "qwen3_moe"}
    model_of(config | {"quantization_config": QUANTIZATION}, Path("config.json"))
    with pytest.raises(ValueError, match="unsupported settings") as caught:
        model_of(config | {"quantization_config": found}, Path("config.json"))
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"])
def test_experts_that_are_stored_together(name: str, sources, ranks: RankPool, tmp_path: Path) -> None:
    """As Transformers writes them; the run and its export are those of the usual form."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(sources[name], tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForCausalLM.from_pretrained(sources[name], dtype=torch.float32)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored and not any(".experts.0." in n for n in stored)
    code, printed = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 0 and "verified on" in printed and f"{len(stored)} tensors in F32 ->" in printed, printed
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back", verify=False)
    assert code == 0, printed
    assert_same_bits(tmp_path / "back", sources[name])


def test_an_expert_that_is_stored_twice(sources, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(sources["qwen3_moe"], tmp_path / "source")
    fused = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path / "source", lambda tensors: tensors.update({fused: torch.zeros(4, 32, 40)}), {})
    code, message = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 2 and f"{fused[:-9]}0.down_proj.weight is stored, and also a part of {fused}" in message, message
