"""Every checkpoint opens under every layout, and a resumed run continues as if it had not stopped."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from conf.schema import ParallelConfig
from parallel import optimizer_state
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_manifest import MANIFEST, find_damage
from parallel.env import World
from parallel.optimizers import OPTIMIZERS
from parallel.weight_loading import load_weights
from tests.parallel.helpers import Variant, build_engine, my_batches, optimizer_tensors, started, state, train, weights

# Tied embeddings are one logical parameter on two pipeline stages; dense and sparse layers take turns; vectors are cut.
QKV = {"head_dim": 12, "qk_norm": "full", "attention_bias": True}
TIED = Variant({"tie_embeddings": True, **QKV}, {"top_k": 1, "every": 2, "ffn_hidden_size": 20})
BF16 = Variant({"qk_norm": "head"}, dtype=torch.bfloat16)

LAYOUTS = {
    "one": (1, {}),
    "tp2 +sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp3 layers 0+4+0": (3, {"pp": 3, "pp_layers": [0, 4, 0]}),
    "ep2": (2, {"ep": 2}),
    "ep2 dp4 instances2": (4, {"ep": 2, "optimizer_instances": 2}),
    "cp2 tp2 etp2": (4, {"cp": 2, "tp": 2, "etp": 2}),
    "tp2 pp2 vpp2 ep2 +sequence": (8, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "sequence_parallel": True}),
}
ONE, TP, VPP, ENDS, EP, INSTANCES, ETP, EIGHT = LAYOUTS
LOADS = {ONE: [TP, VPP, EP, INSTANCES, ETP, EIGHT], TP: [ONE, VPP], VPP: [EP, EIGHT], EP: [TP, INSTANCES], ETP: [ONE]}
LOADS |= {INSTANCES: [EP, EIGHT], EIGHT: [ETP], ENDS: [VPP], EP: [*LOADS[EP], ENDS]}


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def life(world: World, parallel: ParallelConfig, root: Path, variant: Variant) -> dict[str, Any]:
    """Three steps, a checkpoint, two more steps."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, variant)
        train(engine, range(3))
        torch.manual_seed(world.rank)  # each rank has to get its own generator back
        Checkpointer(root, engine, keep=2).save(state(3, world.size))
        kept = optimizer_tensors(engine)
        return {"drawn": draws(), "kept": kept, "told": train(engine, range(3, 5)), "end": optimizer_tensors(engine)}


def second_lives(world: World, parallel: ParallelConfig, roots: list[Path], variant: Variant) -> list[dict[str, Any]]:
    """For each checkpoint: what was loaded, then two more steps."""
    lives = []
    with started(world, parallel) as runtime:
        for root in roots:
            engine = build_engine(runtime, variant)
            Checkpointer(root, engine, keep=2).resume(pytest.fail)
            drawn, kept = draws(), optimizer_tensors(engine)
            told = train(engine, range(3, 5))
            lives.append({"drawn": drawn, "kept": kept, "told": told, "end": optimizer_tensors(engine)})
    return lives


def assert_same_bits(got: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert got.keys() == wanted.keys()
    for kind in wanted:
        assert got[kind].keys() == wanted[kind].keys()
        assert [name for name, whole in wanted[kind].items() if not torch.equal(got[kind][name], whole)] == [], kind


@pytest.fixture(scope="module")
def lives(ranks, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    saved = {}
    for name, (size, degrees) in LAYOUTS.items():
        root = tmp_path_factory.mktemp("saved")
        saved[name] = root, ranks.run(size, life, ParallelConfig(**degrees), root, TIED, timeout=120)[0]
    return saved


@pytest.mark.parametrize("here", LOADS)
def test_every_checkpoint_opens_under_every_layout(ranks, lives, here):
    size, degrees = LAYOUTS[here]
    roots = [lives[there][0] for there in LOADS[here]]
    loaded = ranks.run(size, second_lives, ParallelConfig(**degrees), roots, TIED, timeout=120)[0]
    for there, second in zip(LOADS[here], loaded, strict=True):
        first = lives[there][1]
        assert_same_bits(second["kept"], first["kept"])
        np.testing.assert_allclose(second["told"], first["told"], rtol=1e-6, err_msg=f"{there} -> {here}")


@pytest.mark.parametrize("variant", [TIED, BF16], ids=["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(ranks, tmp_path, variant):
    layout = ParallelConfig(tp=2, ep=2, sequence_parallel=True)
    first = ranks.run(4, life, layout, tmp_path, variant, timeout=120)
    second = [ranked[0] for ranked in ranks.run(4, second_lives, layout, [tmp_path], variant, timeout=120)]
    assert first[0]["drawn"] != first[1]["drawn"]
    for before, after in zip(first, second, strict=True):
        assert after["drawn"] == before["drawn"]
        assert after["told"] == before["told"]
        for when in ("kept", "end"):
            assert_same_bits(after[when], before[when])
    alone = ranks.run(1, second_lives, ParallelConfig(), [tmp_path], variant, timeout=120)[0][0]
    assert_same_bits(alone["kept"], first[0]["kept"])
    # bf16 rounds differently under another layout, and a few tokens then choose another expert.
    np.testing.assert_allclose(alone["told"], first[0]["told"], rtol=1e-6 if variant is TIED else 1e-2)


def as_format_2(directory: Path) -> None:
    """Rewrites a checkpoint as the format before had it: a file's digest is that of its bytes, its header has none of
    tensors, and the manifest lists the states of random number generators."""
    manifest, tensors = json.loads((directory / MANIFEST).read_text()), {}
    for path in directory.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        tensors.pop("random.firsts")
        for key in list(tensors):
            if key.startswith("random."):
                *_, name = key.split(".", 3)
                tensors[f"random.0.{name}"] = kept = tensors.pop(key)
                entry = {"shape": [*kept.shape], "boxes": [[path.name, [0] * kept.dim(), [*kept.shape]]]}
                manifest["tensors"][f"random.0.{name}"] = entry
        safetensors.torch.save_file(tensors, path)
        content = path.read_bytes()
        manifest["files"][path.name] = [len(content), hashlib.blake2b(content, digest_size=16).hexdigest()]
    del manifest["tensors"]["random.firsts"], manifest["digest"]
    manifest["format"] = 2
    said = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["digest"] = hashlib.blake2b(said, digest_size=16).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def test_a_checkpoint_of_format_2_opens(ranks, tmp_path):
    first = ranks.run(1, life, ParallelConfig(), tmp_path, TIED, timeout=60)[0]
    directory = tmp_path / "step_00000003"
    as_format_2(directory)
    second = ranks.run(1, second_lives, ParallelConfig(), [tmp_path], TIED, timeout=60)[0][0]
    assert (second["drawn"], second["told"]) == (first["drawn"], first["told"])
    assert_same_bits(second["kept"], first["kept"])
    (file,) = directory.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "has changed since it was written" in find_damage(directory)


def test_without_its_moments_a_run_goes_another_way(runtime, lives, monkeypatch):
    root, first = lives[ONE]
    monkeypatch.setattr(optimizer_state, "restore", lambda *args, **kwargs: None)
    engine = build_engine(runtime, TIED)
    Checkpointer(root, engine, keep=2).load(root / "step_00000003")
    told = train(engine, range(3, 5))
    np.testing.assert_allclose(told[0], first["told"][0], rtol=1e-6)  # the weights are the same
    assert abs(told[1][0] - first["told"][1][0]) > 1e-4


def adam_states(engine: Any) -> list[dict[str, Tensor]]:
    return [inner for o in engine.optimizer.chained_optimizers for inner in o.optimizer.state.values()]


def test_every_parameter_counts_its_own_updates(runtime, tmp_path):
    engine = build_engine(runtime, TIED)
    train(engine, range(2))
    # Steps and updates differ once an update was skipped; bias correction follows the updates.
    Checkpointer(tmp_path, engine, keep=1).save(state(5, updates=2))
    engine = build_engine(runtime, TIED)
    assert Checkpointer(tmp_path, engine, keep=1).load(tmp_path / "step_00000005") == state(5, updates=2)
    counters = [inner["step"] for inner in adam_states(engine)]
    assert len(counters) == len({counter.data_ptr() for counter in counters}) > 20
    assert {counter.item() for counter in counters} == {2}
    train(engine, range(2, 3))
    assert {inner["step"].item() for inner in adam_states(engine)} == {3}


def test_weights_alone_are_enough_to_evaluate(runtime, tmp_path):
    trained = build_engine(runtime, TIED)
    train(trained, range(2))
    directory = Checkpointer(tmp_path, trained, keep=1).save(state(2))
    reader = build_engine(runtime, TIED, optim=None)
    load_weights(reader, directory)
    assert reader.evaluate(my_batches(runtime, 9)) == trained.evaluate(my_batches(runtime, 9))
    # A run that starts from these weights starts with them in its optimizer as well.
    starter = build_engine(runtime, TIED)
    load_weights(starter, directory)
    assert_same_bits({"weights": weights(starter)}, {"weights": weights(trained)})


@pytest.mark.parametrize("kind", ["weights", *OPTIMIZERS["adamw"].state])
def test_what_is_not_finite_is_named(runtime, kind):
    engine = build_engine(runtime, TIED)
    assert optimizer_state.first_nonfinite(engine) is None  # before the first update there are no moments
    train(engine, range(1))
    assert optimizer_state.first_nonfinite(engine) is None
    parameter = engine.modules[0].get_parameter("layers.1.attention.qkv.weight")
    piece = optimizer_state._optimizer_shards(engine)[parameter]
    held = piece.master.data if kind == "weights" else piece.inner.state[piece.master][kind]
    held[5] = float("nan") if kind == "weights" else float("inf")
    assert optimizer_state.first_nonfinite(engine) == f"{kind} of layers.1.attention.qkv.weight"


def find_nonfinite(world: World) -> str | None:
    """The second rank's half of a parameter is not finite."""
    with started(world, ParallelConfig(tp=2)) as runtime:
        engine = build_engine(runtime, TIED)
        if world.rank == 1:
            engine.modules[0].get_parameter("layers.0.attention.qkv.weight").data[0] = float("inf")
        return optimizer_state.first_nonfinite(engine)


def test_every_rank_hears_what_is_not_finite(ranks):
    assert ranks.run(2, find_nonfinite, timeout=60) == ["weights of layers.0.attention.qkv.weight"] * 2
