"""Invalid or unsupported sources and models are refused by name, and nothing is written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.schema import ModelConfig, MoeConfig
from models.hf.configuration import config_of, differences, family_for, model_of
from models.hf.families import FAMILIES
from parallel.local_launcher import RankPool
from tests.models.hf.conftest import LONGROPE
from tests.models.hf.helpers import run_export, run_import
from tests.training.helpers import ROOT, tiny_config, train
from training import hf_verify
from training.hf_runs import model_name

SHARD = "model-00001-of-00002.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = next(f for f in sorted(folder.glob("*.safetensors")) if Q in load_file(f))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        others = {k: v for k, v in index["weight_map"].items() if v != file.name}
        index["weight_map"] = others | dict.fromkeys(tensors, file.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def truncated(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-7])


def unlisted(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file(tensors | {"another.weight": torch.zeros(2)}, folder / SHARD)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (edited(lambda t: t.pop(Q)), f"1 missing: {Q}"),
        (edited(lambda t: t.update(odd=torch.zeros(2))), "1 unexpected: odd"),
        (edited(lambda t: t.update({Q: torch.zeros(16, 15)})), f"1 of another shape: {Q} [16, 15] instead of [16, 16]"),
        (edited(lambda t: t.update({Q: t[Q].to(torch.int32)})), f"{Q} is of type I32"),
        (truncated, f"{SHARD} is truncated: "),
        (unlisted, "holds another.weight, which model.safetensors.index.json does not list there"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} cannot be read: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    ],
    ids=["missing", "extra", "shape", "type", "truncated", "unlisted", "lost", "config"],
)
def test_a_damaged_source(damage: Callable, expected: str, sources, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(sources["hub"], tmp_path / "source")
    damage(tmp_path / "source")
    code, message = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 2 and expected in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_that_is_not_the_embedding_it_is_tied_to(sources, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(sources["hub"], tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    code, message = run_import(ranks, tmp_path / "source", tmp_path / "run")
    assert code == 2 and "lm_head.weight differs from model.embed_tokens.weight" in message, message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": "all"}, 'sliding_window="all": must be a positive integer, or null'),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: only 0.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic": only default, linear, llama3'),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 is invalid"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 2}}, "beta_fast with rope_type=linear: only"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters="),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention with rope_type=default"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5: only 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "relu"}, 'hidden_act="relu": only silu'),
        ({"head_dim": -7}, "head_dim=-7: must be"),
        ({"num_local_experts": "8"}, 'num_local_experts="8": must be a positive integer'),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0: must be a positive integer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1: unknown key of mixtral"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "only MixtralForCausalLM"),
        ({"model_type": "mamba"}, "model_type is 'mamba', which is not a supported family: mixtral, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_feature(changes: dict, expected: str) -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    model_of(config, Path("config.json"))
    with pytest.raises(ValueError, match=r"unsupported settings|model_type") as caught:
        model_of(config | changes, Path("config.json"))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("qwen3", {"use_sliding_window": "yes"}, 'use_sliding_window="yes": must be true or false'),
        ("qwen3", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "layer_types has sliding_attention"),
        ("qwen3_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}, "mlp_only_layers=[0, 2]: only the first layers"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1: must be a list"),
        ("olmoe", {"clip_qkv": "8"}, 'clip_qkv="8": must be a number, or null'),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}, "only every n-th layer"),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "must have an entry for each of the 36 layers"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 36}, "has chunked_attention: only sliding_attention"),
        (
            "gpt_oss",
            {"layer_types": [*["sliding_attention", "full_attention"] * 17, *["full_attention"] * 2]},
            "every n",
        ),
        ("gpt_oss", {"sliding_window": None}, "must be a positive integer, since layer_types has sliding_attention"),
        ("gpt_oss", {"hidden_act": "gelu"}, 'hidden_act="gelu": only silu'),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        ("llama", {"mlp_bias": 1}, "mlp_bias=1: must be true or false"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=true: only false"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads=8: only num_attention_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax: only sigmoid"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1: only 1e-12"),
        ("ernie4_5_moe", {"moe_layer_end_index": 7}, "the last layer, but it is 7"),
        ("glm4_moe", {"attention_dropout": 0.1}, "attention_dropout=0.1: only 0.0"),
        ("glm4_moe", {"use_qk_norm": "yes"}, 'use_qk_norm="yes": must be true or false'),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: only 0.0"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2: only 1"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be an integer >= 0"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok=null: a number is needed"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true: only false"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method="noaux_tc": only greedy, group_limited_greedy'),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "needs topk_group < n_group"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok=4: only 2"),
        ("phimoe", {"router_jitter_noise": 0.0}, "router_jitter_noise=0.0: only a positive number"),
        ("phimoe", {"input_jitter_noise": 0.01}, "Set it to 0.0 to import"),
        ("phimoe", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, 'rope_type="yarn": only default, longrope'),
        ("phimoe", {"rope_scaling": LONGROPE | {"short_mscale": "1"}}, 'short_mscale="1" is invalid'),
        ("phimoe", {"rope_scaling": LONGROPE | {"long_factor": [0.0]}}, "long_factor=[0.0] is invalid"),
        ("phimoe", {"rope_scaling": LONGROPE}, "short_factor of 4 numbers instead of 64"),
        ("llama4_text", {"no_rope_layers": [0] * 48}, "only every n-th layer without rotary embedding"),
        ("llama4_text", {"moe_layers": [1, 4, 5]}, "moe_layers=[1, 4, 5]: only every n-th layer, and a number of"),
        ("llama4_text", {"attention_chunk_size": None}, "since layer_types has chunked_attention"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 48}, "only chunked_attention, full_attention"),
        ("llama4_text", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: only 0.0"),
        ("llama4_text", {"vision_config": {"hidden_size": 8}}, "unknown key of llama4_text"),
    ],
    ids=str,
)
def test_an_unsupported_feature_of_one_family(name: str, changes: dict, expected: str) -> None:
    with pytest.raises(ValueError, match="unsupported settings") as caught:
        model_of({"model_type": name} | changes, Path("config.json"))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "every", "first"),
    [("sfsfsf", 2, 0), ("ssssss", None, 0), ("ffssss", None, 2), ("ffsfss", 4, 2), ("ffffff", None, 0)],
)
def test_a_pattern_of_layers_comes_back(kinds: str, every: int | None, first: int) -> None:
    names = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    config = {"model_type": "gpt_oss", "num_hidden_layers": 6, "layer_types": names}
    family, model = model_of(config, Path("config.json"))
    assert (model.full_attention_every, model.first_full_attention_layers) == (every, first)
    assert [layer in model.local_layers for layer in range(6)] == [kind == "s" for kind in kinds]
    assert config_of(family, model, config)["layer_types"] == names


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_come_back_from_a_config_json(name: str) -> None:
    """And the defaults are those of Transformers."""
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    needed = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}  # null by default
    theirs = transformers.AutoConfig.for_model(name, **needed)
    _, model = model_of({"model_type": name} | needed, Path("config.json"))
    written = config_of(family, model, {})
    heads = model.head_width if model.kv_lora_rank is None else model.rotary_width
    assert getattr(theirs, "head_dim", None) in (None, heads)
    for field in family.fields:
        if field.key == "head_dim":
            continue
        assert written.get(field.key) == getattr(theirs, field.key), field.key
    assert written["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert model_of(written, Path("config.json"))[1] == model
    assert family_for(model, None) is family


@pytest.mark.parametrize(
    ("settings", "moe", "expected"),
    [
        ({"activation": "relu2"}, {"num_experts": 4, "top_k": 2}, "model.activation=relu2"),
        ({}, {"num_experts": 4, "top_k": 2, "every": 2}, "model.moe.every=2, but the family has only 1"),
        ({}, {"num_experts": 4, "top_k": 2, "score_function": "sigmoid"}, "model.moe.score_function=sigmoid"),
        ({}, {"num_experts": 4, "top_k": 1}, "model.moe.top_k=1: Mixtral divides"),
        ({}, {"num_experts": 4, "top_k": 2, "load_balancing": "expert_choice"}, "load_balancing=expert_choice"),
    ],
    ids=str,
)
def test_a_model_that_fits_no_family(settings: dict, moe: dict, expected: str) -> None:
    model = ModelConfig(**{"activation": "swiglu"} | settings, moe=MoeConfig(**moe))
    assert any(expected in reason for reason in differences(FAMILIES["mixtral"], model))
    with pytest.raises(ValueError, match="fits no supported family") as caught:
        family_for(model, None)
    assert expected in str(caught.value)


def test_the_nearest_families_are_named_first() -> None:
    moe = MoeConfig(num_experts=8, top_k=2)
    with pytest.raises(ValueError) as caught:
        family_for(ModelConfig(qk_norm="head", embedding_multiplier=16.0, moe=moe), None)
    message = str(caught.value)
    assert (
        " family, nearest first. qwen3_moe: model.embedding_multiplier=16.0, but the family has only 1.0 | " in message
    )
    assert message.count(" | ") == 2 and " | phimoe" not in message
    assert re.search(r"\. Further from it: .*phimoe.* \(family=NAME says why\)$", message)
    with pytest.raises(ValueError, match=r"fits no supported family\. phimoe: model\.qk_norm=head.*layernorm"):
        family_for(ModelConfig(qk_norm="head", moe=moe), "phimoe")


@pytest.mark.parametrize(
    ("width", "moe", "written"),
    [(40, {"ffn_hidden_size": 40}, 40), (48, {"ffn_hidden_size": 40}, 40), (48, {}, 48)],
    ids=str,
)
def test_the_width_of_experts_is_the_only_one_that_mixtral_has(width: int, moe: dict, written: int) -> None:
    moe = {"num_experts": 4, "top_k": 2} | moe
    model = ModelConfig(activation="swiglu", ffn_hidden_size=width, moe=MoeConfig(**moe))
    family = FAMILIES["mixtral"]
    assert not differences(family, model)
    assert config_of(family, model, {})["intermediate_size"] == written
    dense_too = replace(model, ffn_hidden_size=written + 1, moe=replace(model.moe, ffn_hidden_size=written, every=2))
    assert any(f"model.moe.ffn_hidden_size={written}, but" in reason for reason in differences(family, dense_too))


def test_the_name_of_a_model_is_not_that_of_a_preset(tmp_path: Path) -> None:
    assert model_name(tmp_path / "mine", "upcycled") == "mine"
    assert model_name(tmp_path / "mixtral_8x7b", "upcycled") == "mixtral_8x7b_upcycled"
    assert model_name(tmp_path / "mixtral_8x7b", "imported") == "mixtral_8x7b_imported"


def test_a_balancing_bias_has_no_place_unless_it_is_zero(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=1)
    config.model.activation = "swiglu"
    config.model.moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, bias_update_rate=0.0, ffn_hidden_size=40)
    assert ranks.run(1, train, config, timeout=120.0) == [0]
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "zero")
    assert code == 0 and "verified on" in printed, printed
    config = tiny_config(corpus, tmp_path / "moved", steps=1)
    config.model.activation = "swiglu"
    config.model.moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, bias_update_rate=0.1)
    assert ranks.run(1, train, config, timeout=120.0) == [0]
    code, message = run_export(ranks, tmp_path / "moved", tmp_path / "out")
    assert code == 2 and "layers.0.ffn.router.bias is a balancing bias that is not zero" in message, message
    assert not (tmp_path / "out").exists()


def test_an_import_is_no_run_to_continue(corpus: Path, runs, ranks: RankPool, tmp_path: Path) -> None:
    """It has no optimizer states."""
    from training.run_dir import load_config

    shutil.copytree(runs["mixtral"], tmp_path / "run")
    config = tiny_config(corpus, tmp_path / "run", steps=1, sequence_length=64)
    config.model = load_config(runs["mixtral"]).model
    config.data.tokenizer = str(tmp_path / "run" / "tokenizer.json")
    message = ranks.run(1, trained_message, config, timeout=120.0)[0]
    assert "holds weights without optimizer states" in message and "checkpoint.load=" in message


def trained_message(world, config) -> str:
    try:
        return f"exit code {train(world, config)}"
    except ValueError as error:
        return str(error)


def test_without_transformers_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bash launch/setup.sh.*verify=false converts without verification"):
        hf_verify.check_available("fp32")


def test_the_commands_exit_with_2_and_one_line(sources, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    command = [sys.executable, "-m", "launch.import_hf", f"source={sources['hub']}", f"output={tmp_path / 'taken'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("switchyard: error: output=") and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
