"""Into a run and out again: the same numbers as Transformers, the same bits on the disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conf.commands import InferenceConfig
from conf.schema import ParallelConfig
from models.hf.configuration import model_of
from models.hf.mapping import parameters_of
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import LENGTH, assert_same_bits, in_rank, run_export, run_import, tensors_in
from tests.training.helpers import tiny_config, train, trajectory
from training.hf_verify import BOUNDS, Comparison, Different, _compare_rank, check_same, write_reference
from training.run_dir import load_config

IDS = [(7 * i + i * i) % 320 for i in range(LENGTH)]


def ours(world: World, run: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits [S, V], the mean loss and its gradients, of an imported run."""
    from training.load_checkpoint import load_model

    with load_model(run, InferenceConfig(precision="fp32"), world) as loaded:
        (stage,) = loaded.built.engine.modules
        tokens = torch.tensor([IDS])
        positions = torch.arange(LENGTH)[None]
        loss = stage(tokens, positions, tokens.roll(-1, 1))[:, :-1].mean()
        loss.backward()
        gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        return stage(tokens, positions)[0].detach(), loss.detach(), gradients


LATENT = {
    **{"q": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"},
    **{"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"},
}


def attention_gradients(prefix: str, attention: torch.nn.Module) -> dict[str, Tensor]:
    """Of the projections of queries, keys and values."""
    if hasattr(attention, "kv_b_proj"):
        layers = {ours: getattr(attention, part, None) for ours, part in LATENT.items()}
        return {f"{prefix}{ours}.weight": layer.weight.grad for ours, layer in layers.items() if layer is not None}
    q, k, v = (getattr(attention, f"{part}_proj").weight.grad for part in "qkv")
    # Two groups of two query heads: q0 q1 k0 v0 q2 q3 k1 v1.
    (q0, q1), (k0, k1), (v0, v1) = q.chunk(2), k.chunk(2), v.chunk(2)
    grads = {f"{prefix}qkv.weight": torch.cat([q0, k0, v0, q1, k1, v1])}
    if attention.q_proj.bias is not None:
        q, k, v = (getattr(attention, f"{part}_proj").bias.grad.chunk(2) for part in "qkv")
        grads[f"{prefix}qkv.bias"] = torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]])
    return grads


def gradients_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Of its weight and its bias, if it has one."""
    return {f"{name}.{part}": parameter.grad for part, parameter in module.named_parameters()}


def theirs(source: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of Transformers' model, its gradients under our names and in our layout.

    Args:
        shapes: of our parameters.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.tensor([IDS])
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    if model.config.model_type in STORED_AS_COMPUTED:
        return out.logits[0].detach(), out.loss.detach(), gradients_by_mapping(model, shapes)
    grads = {"embedding.weight": model.model.embed_tokens.weight.grad, **gradients_of("final_norm", model.model.norm)}
    grads |= gradients_of("head", model.lm_head)
    if model.config.tie_word_embeddings:
        del grads["head.weight"]
    for i, layer in enumerate(model.model.layers):
        grads |= gradients_of(f"layers.{i}.attention_norm", layer.input_layernorm)
        grads |= gradients_of(f"layers.{i}.ffn_norm", layer.post_attention_layernorm)
        grads |= gradients_of(f"layers.{i}.attention.out", layer.self_attn.o_proj)
        grads |= attention_gradients(f"layers.{i}.attention.", layer.self_attn)
        shared = getattr(layer.mlp, "shared_experts", getattr(layer.mlp, "shared_expert", None))
        for part in ("gate", "up", "down") if shared is not None else ():
            grads |= gradients_of(f"layers.{i}.ffn.shared.ffn.{part}", getattr(shared, f"{part}_proj"))
        if hasattr(layer.mlp, "shared_expert_gate"):
            grads[f"layers.{i}.ffn.shared.gate"] = layer.mlp.shared_expert_gate.weight.grad
        for part in "qk" if hasattr(layer.self_attn, "q_norm") else "":
            norm = getattr(layer.self_attn, f"{part}_norm").weight.grad
            grads[f"layers.{i}.attention.{part}_layernorm.weight"] = norm
        if hasattr(layer.mlp, "experts"):
            both, down = layer.mlp.experts.gate_up_proj.grad, layer.mlp.experts.down_proj.grad
            router = getattr(layer.mlp, "gate", None) or layer.mlp.router
            grads[f"layers.{i}.ffn.router.weight"] = router.weight.grad
            grads[f"layers.{i}.ffn.experts.w_in"] = torch.stack(both.chunk(2, 1), 1).permute(0, 3, 1, 2)
            grads[f"layers.{i}.ffn.experts.w_out"] = down.transpose(1, 2)
        else:
            for part in ("gate", "up", "down"):
                grads |= gradients_of(f"layers.{i}.ffn.{part}", getattr(layer.mlp, f"{part}_proj"))
    return out.logits[0].detach(), out.loss.detach(), grads


STORED_AS_COMPUTED = {
    "gpt_oss": (),
    "llama4_text": (),
    "granitemoe": (
        ("input_linear.weight", "experts.gate_up_proj"),
        ("output_linear.weight", "experts.down_proj"),
        ("router.layer.weight", "router.weight"),
    ),
}
"""Families whose stored tensors are Transformers' parameters, and those of them that have other names in the files."""


def gradients_by_mapping(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """By the family's mapping of tensors, which the comparison of logits has verified."""
    family, settings = model_of(model.config.to_dict(), Path("config.json"))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for stored, computed in STORED_AS_COMPUTED[family.name]:
        grads |= {name.replace(computed, stored): grads.pop(name) for name in list(grads) if computed in name}
    parameters, unknown = parameters_of(family, settings, shapes)
    assert not unknown and {n for p in parameters for n in p.tensors(settings)} == grads.keys()
    return {p.name: torch.cat([p.join([grads[n] for n in piece], settings) for piece in p.pieces]) for p in parameters}


FAMILIES = [
    "mixtral",
    "llama",
    "llama_plain",
    "qwen3",
    "qwen3_plain",
    "qwen3_moe",
    "olmoe",
    "qwen2",
    "qwen2_plain",
    "qwen2_moe",
    "gpt_oss",
    "gpt_oss_plain",
    "granitemoe",
    "granitemoe_plain",
    "deepseek_v3",
    "deepseek_v3_plain",
    "deepseek_v2",
    "deepseek_v2_plain",
    "glm4_moe",
    "glm4_moe_plain",
    "minimax_m2",
    "minimax_m2_plain",
    "ernie4_5_moe",
    "ernie4_5_moe_plain",
    "llama4",
    "llama4_plain",
    "phimoe",
    "phimoe_plain",
]

FOUR_RANKS = ["gpt_oss", "granitemoe", "glm4_moe", "minimax_m2", "ernie4_5_moe", "llama4", "phimoe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, sources, runs, ranks: RankPool) -> None:
    got = ranks.run(1, ours, str(runs[name]), timeout=120.0)[0]
    wanted = theirs(sources[name], {key: tuple(gradient.shape) for key, gradient in got[2].items()})
    assert (got[0] - wanted[0]).norm() <= 1e-5 * wanted[0].norm()
    assert got[1].item() == pytest.approx(wanted[1].item(), rel=1e-5)
    assert got[2].keys() == wanted[2].keys()
    for key, grad in wanted[2].items():
        assert (got[2][key] - grad).norm() <= 1e-5 * grad.norm(), key


@pytest.mark.parametrize("name", [*FAMILIES, "hub"])
def test_an_export_gives_every_tensor_back(name: str, sources, runs, ranks: RankPool, tmp_path: Path) -> None:
    code, printed = run_export(ranks, runs[name], tmp_path / "back", shard_gib=5e-6)
    assert code == 0 and "verified on" in printed, printed
    assert_same_bits(tmp_path / "back", sources[name])
    before, after = (json.loads((d / "config.json").read_text()) for d in (sources[name], tmp_path / "back"))
    assert {k: v for k, v in after.items() if k != "dtype"} == {
        k: v for k, v in before.items() if k not in ("dtype", "torch_dtype")
    }
    assert after["dtype"] == before.get("dtype", before.get("torch_dtype"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_in(sources[name]).keys()


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_compute_what_transformers_does(name: str, sources, runs, ranks: RankPool, tmp_path: Path) -> None:
    write_reference(sources[name], IDS, "fp32", tmp_path / "reference.safetensors")
    here = InferenceConfig(precision="fp32", parallel=ParallelConfig(tp=2, ep=2, pp=2))
    task = Comparison(here, str(runs[name]), str(tmp_path / "reference.safetensors"), BOUNDS["fp32"], "ids")
    assert ranks.run(4, _compare_rank, task, timeout=120.0) == [0] * 4


@pytest.mark.parametrize("degrees", [{"tp": 2, "sequence_parallel": True}, {"ep": 2}, {"pp": 2}, {"cp": 2}], ids=str)
def test_two_ranks_compute_what_transformers_does(
    degrees: dict[str, Any], sources, runs, ranks: RankPool, tmp_path: Path
) -> None:
    write_reference(sources["mixtral"], IDS, "fp32", tmp_path / "reference.safetensors")
    here = InferenceConfig(precision="fp32", parallel=ParallelConfig(**degrees))
    task = Comparison(here, str(runs["mixtral"]), str(tmp_path / "reference.safetensors"), BOUNDS["fp32"], "ids")
    assert ranks.run(2, _compare_rank, task, timeout=120.0) == [0, 0]


def test_a_run_trains_on_alike_from_an_import_of_its_export(
    corpus: Path, runs, ranks: RankPool, tmp_path: Path
) -> None:
    def loaded(name: str, load: Path) -> list[tuple[Any, ...]]:
        config = tiny_config(corpus, tmp_path / name, steps=3, sequence_length=LENGTH)
        config.model, config.checkpoint.load = load_config(load).model, str(load)
        config.data.tokenizer = str(load / "tokenizer.json")
        assert ranks.run(1, train, config, timeout=120.0) == [0]
        return trajectory(tmp_path / name)

    code, printed = run_export(ranks, runs["mixtral"], tmp_path / "exported", verify=False)
    assert code == 0 and "were not verified" in printed
    code, printed = run_import(ranks, tmp_path / "exported", tmp_path / "again", verify=False)
    assert code == 0 and "were not verified" in printed
    first = loaded("first", runs["mixtral"])
    again = loaded("second", tmp_path / "again")
    assert first == again
    # What was trained is written too, in fp32, with the files of the model that it comes from and of its tokenizer.
    (tmp_path / "first" / "tokenizer").mkdir()
    (tmp_path / "first" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    code, printed = run_export(ranks, tmp_path / "first", tmp_path / "trained")
    assert code == 0 and "verified on" in printed, printed
    assert (tmp_path / "trained" / "tokenizer.json").read_bytes() == (runs["mixtral"] / "tokenizer.json").read_bytes()
    assert (tmp_path / "trained" / "chat_template.jinja").read_text() == "{{ messages }}"
    moved = (
        tensors_in(tmp_path / "trained")["model.norm.weight"] - tensors_in(tmp_path / "exported")["model.norm.weight"]
    )
    assert moved.any()


def test_an_export_with_another_tokenizer_ends_where_it_does(runs, ranks: RankPool, tmp_path: Path) -> None:
    """The source's files about its own tokenizer are not those of the run's."""
    shutil.copytree(runs["mixtral"], tmp_path / "imported")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "imported" / "hf" / name).read_text())
        (tmp_path / "imported" / "hf" / name).write_text(json.dumps(found | {"eos_token_id": 5}))
    (tmp_path / "imported" / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(tmp_path / "imported", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["checkpoint"]["load"] = str(tmp_path / "imported")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))

    def ends(output: str) -> tuple[list[int], bool]:
        code, printed = run_export(ranks, tmp_path / "run", tmp_path / output, verify=False)
        assert code == 0, printed
        names = ("config.json", "generation_config.json")
        ids = [json.loads((tmp_path / output / name).read_text())["eos_token_id"] for name in names]
        return ids, (tmp_path / output / "chat_template.jinja").exists()

    assert ends("same") == ([5, 5], True)
    content = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(content))  # other bytes
    assert ends("other") == ([0, 0], False)


def test_a_wrong_layout_does_not_get_past_the_comparison(sources, ranks: RankPool, tmp_path: Path) -> None:
    code, printed = ranks.run(1, import_swapped, str(sources["mixtral"]), str(tmp_path / "run"), timeout=120.0)[0]
    assert code == 1 and "NOT THE SAME" in printed and "output of layer 1" in printed, printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "part", "where"),
    [(name, "self_attn.o_proj.weight", "layer 1") for name in FAMILIES]
    + [("mixtral", "lm_head.weight", "no layer, so the final norm or the output layer")],
)
def test_the_layer_with_a_wrong_weight_is_named(
    name: str, part: str, where: str, sources, runs, ranks: RankPool, tmp_path: Path
) -> None:
    shutil.copytree(sources[name], tmp_path / "changed")
    wrong = part if part == "lm_head.weight" else f"model.layers.1.{part}"
    index = json.loads((tmp_path / "changed" / "model.safetensors.index.json").read_text())
    file = tmp_path / "changed" / index["weight_map"][wrong]
    tensors = load_file(file)
    tensors[wrong][3, 5] += 2.0
    save_file(tensors, file, metadata={"format": "pt"})
    task = (str(tmp_path / "changed"), str(runs[name] / "checkpoints" / "step_00000000"), str(tmp_path))
    printed = ranks.run(1, compared, *task, timeout=120.0)[0][1]
    assert "NOT THE SAME" in printed and "output of layer 0: differs by " in printed, printed
    assert f"the first to differ by more than 1e-04: {where}\n" in printed, printed


def compared(world: World, source: str, step: str, folder: str) -> tuple[int, str]:
    def compare(_config: None) -> int:
        try:
            check_same(InferenceConfig(precision="fp32"), Path(source), Path(step), None, Path(folder))
        except Different:
            return 1
        return 0

    return in_rank(world, compare, None)


def import_swapped(world: World, source: str, output: str) -> tuple[int, str]:
    """With gate and up exchanged."""
    from conf.commands import ImportConfig
    from models.hf.families import FAMILIES
    from models.hf.family import GATE_AND_UP, Layout
    from tests.models.hf.helpers import _import

    swapped = Layout(lambda parts, model: GATE_AND_UP.join(parts[::-1], model), GATE_AND_UP.split)
    right = FAMILIES["mixtral"]
    rules = tuple(replace(r, layout=swapped) if r.layout is GATE_AND_UP else r for r in right.weights)
    FAMILIES["mixtral"] = replace(right, weights=rules)
    try:
        return in_rank(world, _import, ImportConfig(source=source, output=output))
    finally:
        FAMILIES["mixtral"] = right
