"""What only the DeepSeek families have, another name of the same model among it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.commands import InferenceConfig
from conf.schema import ModelConfig, MoeConfig, ParallelConfig
from models.hf.configuration import differences
from models.hf.deepseek_v2 import DEEPSEEK_V2
from models.hf.deepseek_v3 import DEEPSEEK_V3
from models.hf.files import INDEX
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import assert_same_bits, run_export, run_import
from tests.models.hf.test_round_trip import IDS
from tests.training.helpers import tiny_config, train
from training.hf_verify import BOUNDS, Comparison, _compare_rank, write_reference


def with_tensors(source: Path, folder: Path, added: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a source with further tensors and other keys of config.json."""
    shutil.copytree(source, folder)
    index = json.loads((folder / INDEX).read_text())
    file = folder / min(index["weight_map"].values())
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(added, file.name)
    (folder / INDEX).write_text(json.dumps(index))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


LAYER = "model.layers.2."
"""The first after the two of the model."""


def test_another_layer_is_not_left_out(sources, ranks: RankPool, tmp_path: Path) -> None:
    """A config.json with too few layers must not cut a model short."""
    added = {f"{LAYER}input_layernorm.weight": torch.zeros(4)}
    source = with_tensors(sources["deepseek_v3"], tmp_path / "source", added)
    code, message = run_import(ranks, source, tmp_path / "run", verify=False)
    assert code == 2 and f"1 unexpected: {LAYER}input_layernorm.weight" in message, message


def test_kimi_k2_is_the_same_model(sources, ranks: RankPool, tmp_path: Path) -> None:
    source = with_tensors(sources["deepseek_v3"], tmp_path / "source", {}, model_type="kimi_k2")
    code, printed = run_import(ranks, source, tmp_path / "run")
    assert code == 0 and "verified on" in printed, printed
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back")
    assert code == 0 and "verified on" in printed, printed
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "kimi_k2"
    assert_same_bits(tmp_path / "back", source)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_four_ranks_compute_what_transformers_does(name: str, sources, runs, ranks: RankPool, tmp_path: Path) -> None:
    write_reference(sources[name], IDS, "fp32", tmp_path / "reference.safetensors")
    here = InferenceConfig(precision="fp32", parallel=ParallelConfig(tp=2, pp=2, ep=2, sequence_parallel=True))
    task = Comparison(here, str(runs[name]), str(tmp_path / "reference.safetensors"), BOUNDS["fp32"], "ids")
    assert ranks.run(4, _compare_rank, task, timeout=120.0) == [0] * 4


LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "activation": "swiglu"}
EXPERTS = {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "capacity_factor": None}
SIGMOID = {"score_function": "sigmoid", "bias_update_rate": 0.1}


def test_what_was_trained_here_is_exported(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """With the bias that balancing has moved."""
    config = tiny_config(corpus, tmp_path / "run", steps=1)
    config.model = ModelConfig(
        **{"num_layers": 2, "hidden_size": 32, "vocab_size": config.model.vocab_size, **LATENT},
        moe=MoeConfig(**EXPERTS, **SIGMOID),
    )
    assert ranks.run(1, train, config, timeout=120.0) == [0]
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "out")
    assert code == 0 and "verified on" in printed and "as deepseek_v3" in printed, printed
    tensors = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    biases = [t for file in tensors for name, t in file.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("family", "model", "moe", "expected"),
    [
        (DEEPSEEK_V3, {**LATENT, "kv_lora_rank": None}, SIGMOID, "model.kv_lora_rank=null, but"),
        (DEEPSEEK_V3, LATENT, {"score_function": "sigmoid"}, "model.moe.bias_update_rate=null: the family has"),
        (DEEPSEEK_V3, LATENT, {**SIGMOID, "num_shared_experts": 0}, "model.moe.num_shared_experts=0"),
        (DEEPSEEK_V3, LATENT, {}, "model.moe.score_function=softmax"),
        (DEEPSEEK_V2, {**LATENT, "rope_interleave": True}, {}, "model.moe.renormalize=null"),
        (
            DEEPSEEK_V2,
            {**LATENT, "rope_interleave": True},
            {"renormalize": False, "num_expert_groups": 2},
            "model.moe.group_score=top2, but the family has only max",
        ),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_a_model_that_does_not_fit(family: Any, model: dict, moe: dict, expected: str) -> None:
    found = differences(family, ModelConfig(**model, moe=MoeConfig(**{**EXPERTS, **moe})))
    assert any(expected in reason for reason in found), found


def test_minimax_m2_may_count_the_dimensions_that_it_rotates(sources, ranks: RankPool, tmp_path: Path) -> None:
    """As the published files do, instead of naming their share."""
    source = with_tensors(sources["minimax_m2"], tmp_path / "source", {}, rotary_dim=6, rope_theta=1e4)
    written = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != "rope_parameters"}))
    code, printed = run_import(ranks, source, tmp_path / "run")
    assert code == 0 and "verified on" in printed, printed
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back")
    assert code == 0 and "verified on" in printed, printed
    assert_same_bits(tmp_path / "back", source)
