"""What a stage keeps, counted on the meta device: against peaks that were measured, against what autograd's own hooks
see, and against the formulas of the estimate."""

from typing import Any

import pytest
import torch

from benchmarks.planned_memory import compare
from benchmarks.published import composed
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from tests.training.test_planner import MEASURED
from training.kept_activations import Activations
from training.memory_estimate import micro_batches_in_flight, stage_memory, stages_of

Counts = dict[str, Any]


def counted(world: World, overrides: str, ranks: int, on_gpu: bool, bf16: bool, stage: int = 0) -> Counts:
    """meta_step (rank function: it has a world of its own)."""
    from training.meta_step import meta_step

    config = composed(overrides.split())
    layout = Layout.of(config.parallel, ranks)
    found = meta_step(config, layout, stage, on_gpu=on_gpu, bf16=bf16)
    kinds = {kind: sum(sizes) / len(sizes) for kind, sizes in found.of_layers.items() if sizes}
    in_flight = micro_batches_in_flight(layout, stage, 10**6)
    return {**kinds, "stage": found.activations(in_flight), "buffer": found.buffer}


@pytest.mark.parametrize("overrides", MEASURED, ids=lambda x: str(x)[:45])
def test_one_h200_held_what_is_counted(overrides: str, ranks: RankPool) -> None:
    """Within 1 % of peaks that PyTorch's allocator reported, with the implementations of a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    found = ranks.run(1, counted, overrides, 1, True, True, timeout=120)[0]
    config = composed([*overrides.split(), "cluster=h200"])
    estimate = stage_memory(config, Layout(1), stages_of(config.model, Layout(1))[0], bf16=True, on_gpu=True)
    static = estimate.weights + estimate.gradients + estimate.optimizer
    assert (static + found["stage"]) / 1e9 == pytest.approx(MEASURED[overrides][1], rel=0.01)


SIZES = "train.sequence_length=512 train.micro_batch_size=2 train.global_batch_size=1024 model.vocab_size=4096"
QWEN = "model=qwen3_30b_a3b model.num_layers=2"
TP = "parallel.tp=2 parallel.sequence_parallel=true"
LAYOUTS = {
    "model=tiny_dense": 1,
    "model=tiny_dense parallel.tp=2": 2,
    "model=switch_base_8 model.num_layers=4": 1,
    "model=switch_base_8 model.num_layers=4 parallel.ep=2 model.moe.jitter=0.1": 2,
    "model=olmoe_1b_7b model.num_layers=2": 1,
    "model=mixtral_8x7b model.num_layers=2": 1,
    "model=mixtral_8x7b model.num_layers=2 model.reward_head=true": 1,
    f"model=mixtral_8x7b model.num_layers=2 model.reward_head=true {TP} parallel.ep=2": 2,
    f"model=mixtral_8x7b model.num_layers=2 {TP} parallel.ep=4 parallel.etp=2": 8,
    "model=mixtral_8x7b model.num_layers=4 parallel.pp=2 parallel.ep=2": 4,
    "model=mixtral_8x7b model.num_layers=2 parallel.pp=2 parallel.pp_layers=[0,2]": 2,
    f"{QWEN} {TP} parallel.ep=8": 16,
    f"{QWEN} parallel.tp=2 parallel.ep=4": 8,
    f"{QWEN} parallel.cp=2 parallel.ep=8": 16,
    **{f"{QWEN} parallel.ep=8 model.recompute=[{kind}]": 8 for kind in ("norm", "activation", "moe", "full")},
    f"{QWEN} model.recompute=[norm,activation]": 1,
    "model=gpt_oss_20b model.num_layers=2": 1,
    "model=deepseek_v2_lite model.num_layers=3 parallel.ep=8": 8,
    f"model=deepseek_v3 model.num_layers=5 parallel.ep=64 {TP}": 64,
    "model=deepseek_v3 model.num_layers=5 parallel.ep=64 model.recompute=[moe]": 64,
}


@pytest.mark.parametrize("on_gpu", [True, False], ids=["GPU", "CPU"])
@pytest.mark.parametrize(("overrides", "world"), LAYOUTS.items())
def test_formulas_are_what_is_counted(overrides: str, world: int, on_gpu: bool, ranks: RankPool) -> None:
    """Layer by layer, and the peak of a whole stage, in bf16 on a GPU and in fp32 on a CPU."""
    if on_gpu:
        pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    overrides = f"{overrides} {SIZES}"
    found = ranks.run(1, counted, overrides, world, on_gpu, on_gpu, timeout=120)[0]
    config = composed(overrides.split())
    layout = Layout.of(config.parallel, world)
    of = Activations(config, layout, bf16=on_gpu, on_gpu=on_gpu)
    for kind in {"sparse", "dense"} & found.keys():
        assert of.layer(sparse=kind == "sparse") == pytest.approx(found[kind], rel=0.03), kind
    assert of.gathered() == found["buffer"]
    memory = stage_memory(config, layout, stages_of(config.model, layout)[0], bf16=on_gpu, on_gpu=on_gpu)
    assert memory.activations == pytest.approx(found["stage"], rel=0.05)


ATTENTION = {
    "model.num_attention_heads=1": 1,
    "model.num_attention_heads=2": 1,
    "model.num_attention_heads=2 parallel.tp=2": 2,
    "model.num_attention_heads=1 parallel.cp=2": 2,
    "model.num_attention_heads=8 model.num_query_groups=2 model.qk_norm=null parallel.cp=4": 4,
    "model.num_attention_heads=4 model.num_query_groups=2 model.no_rope_every=2": 1,
    "model.num_attention_heads=2 model.qk_norm=l2": 1,
    "model.num_attention_heads=4 model.num_query_groups=1 model.qk_norm=full": 1,
}


@pytest.mark.parametrize("on_gpu", [True, False], ids=["GPU", "CPU"])
@pytest.mark.parametrize(("overrides", "world"), ATTENTION.items())
def test_every_tensor_that_attention_keeps_is_counted(
    overrides: str, world: int, on_gpu: bool, ranks: RankPool
) -> None:
    """In a layer so narrow that a copy of the queries is 3 % of it."""
    if on_gpu:
        pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    narrow = "model=tiny_dense model.hidden_size=128 model.ffn_hidden_size=512 model.num_layers=2"
    overrides = f"{narrow} {overrides} {SIZES}"
    found = ranks.run(1, counted, overrides, world, on_gpu, on_gpu, timeout=120)[0]
    config = composed(overrides.split())
    of = Activations(config, Layout.of(config.parallel, world), bf16=on_gpu, on_gpu=on_gpu)
    assert of.layer(sparse=False) == pytest.approx(found["dense"], rel=0.002)


def test_frozen_layers_gather_into_no_buffer(ranks: RankPool) -> None:
    overrides = f"{QWEN} {TP} parallel.ep=8 lora.rank=8 {SIZES}"
    found = ranks.run(1, counted, overrides, 16, False, False, timeout=120)[0]
    config = composed(overrides.split())
    layout = Layout.of(config.parallel, 16)
    memory = stage_memory(config, layout, stages_of(config.model, layout)[0], bf16=False, on_gpu=False)
    assert found["buffer"] == 0 and memory.activations == pytest.approx(found["stage"], rel=0.01)


def test_rows_that_travel_in_parts_keep_no_more(ranks: RankPool) -> None:
    of_degree = [f"{QWEN} parallel.ep=8 {SIZES} model.moe.overlap_degree={degree}" for degree in (1, 4)]
    at_once, in_parts = (ranks.run(1, counted, words, 8, False, False, timeout=300)[0] for words in of_degree)
    assert in_parts["sparse"] == pytest.approx(at_once["sparse"], rel=0.01)


def seen_by_hooks(world: World, overrides: str) -> tuple[float, float]:
    """(bytes of the storages that autograd saves in a forward pass, bytes of what is alive) (rank function)."""
    from training import meta_step
    from training.live_storages import storage_identity

    saved: dict[int, int] = {}
    run = meta_step.ModelChunk.forward

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[storage_identity(tensor)] = tensor.untyped_storage().nbytes()
        kept.append(tensor.untyped_storage())
        return tensor

    def forward(chunk: Any, *args: Any) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(chunk, *args)
        for tensor in [*chunk.parameters(), *chunk.buffers()]:
            saved.pop(storage_identity(tensor), None)
        return out

    kept: list[Any] = []
    meta_step.ModelChunk.forward = forward
    try:
        config = composed(overrides.split())
        found = meta_step.meta_step(config, Layout(1), 0, on_gpu=False, bf16=True)
    finally:
        meta_step.ModelChunk.forward = run
    of = Activations(config, Layout(1), True, False)
    output = of.tokens * of.value * config.model.hidden_size  # of the last layer, which the head counts as its input
    return sum(saved.values()), found.kept + of.head() - output


@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "deepseek_v2_lite", "switch_base_8"])
def test_what_is_alive_is_what_autograd_saves(model: str, ranks: RankPool) -> None:
    overrides = f"model={model} model.num_layers=2 {SIZES}"
    saved, alive = ranks.run(1, seen_by_hooks, overrides, timeout=120)[0]
    assert saved == pytest.approx(alive, rel=0.01)


@pytest.mark.parametrize("name", ["switch", "qwen3", "deepseek, tp sp ep", "qwen3, adapters"])
def test_a_step_on_this_cpu_takes_what_is_planned(name: str, ranks: RankPool) -> None:
    """python -m benchmarks.planned_memory has more cases."""
    peaks = compare(name, ranks)
    assert peaks.planned == pytest.approx(peaks.measured, rel=0.05)
    assert peaks.counted == pytest.approx(peaks.measured, rel=0.03)
