"""`python -m benchmarks.planned_memory [name ...]`: the peak of a training step's memory that is planned, counted on
the meta device and measured, for small models of several architectures, layouts and ways of activation checkpointing,
on this machine's CPU.

planned   training.memory_estimate, which `launch.plan` and `launch.check` use: formulas
counted   training.meta_step, in place of the activations: the model runs on meta tensors
measured  weights, gradients and optimizer states, and the peak of PyTorch's allocator during a step beyond them

All are of the rank that needs most."""

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.published import composed
from conf.schema import Config
from parallel.layout import Layout

SIZES = "train.sequence_length=512 train.micro_batch_size=2 model.vocab_size=2048 precision=fp32"
"""Enough tokens that what is of a fixed size, blocks of rows in cache, does not count."""
NARROW = "model.num_layers=3 model.hidden_size=256 model.num_attention_heads=4 model.ffn_hidden_size=512"
EXPERTS = "model.moe.num_experts=16 model.moe.ffn_hidden_size=192"
LATENT = "model.q_lora_rank=128 model.kv_lora_rank=64 model.qk_nope_head_dim=32 model.qk_rope_head_dim=16"
CASES = {
    # name: (ranks, overrides)
    "dense": (1, f"model=tiny_dense {NARROW}"),
    "dense, tp": (2, f"model=tiny_dense {NARROW} parallel.tp=2"),
    "switch": (1, f"model=tiny_switch {NARROW} model.num_layers=4"),
    "switch, ep, capacity 1.25": (2, f"model=tiny_switch {NARROW} model.num_layers=4 parallel.ep=2"),
    "mixtral": (1, f"model=mixtral_8x7b {NARROW} model.num_query_groups=2"),
    "mixtral, tp sp ep": (
        4,
        f"model=mixtral_8x7b {NARROW} model.num_query_groups=2 parallel.tp=2 parallel.sequence_parallel=true "
        "parallel.ep=4",
    ),
    "mixtral, pp": (2, f"model=mixtral_8x7b {NARROW} model.num_layers=4 model.num_query_groups=2 parallel.pp=2"),
    "qwen3": (1, f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS}"),
    "qwen3, ep": (2, f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} parallel.ep=2"),
    "qwen3, norm and activation": (
        1,
        f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} model.recompute=[norm,activation]",
    ),
    "qwen3, moe": (1, f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} model.recompute=[moe]"),
    "qwen3, full": (1, f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} model.recompute=[full]"),
    "qwen3, adapters": (1, f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} lora.rank=8"),
    "qwen3, adapters of attention, ep": (
        2,
        f"model=qwen3_30b_a3b {NARROW} model.head_dim=64 {EXPERTS} parallel.ep=2 lora.rank=8 lora.dropout=0.1 "
        "lora.target=['*.attention.*']",
    ),
    "deepseek": (1, f"model=deepseek_v3 {NARROW} model.v_head_dim=32 {LATENT} {EXPERTS}"),
    "deepseek, tp sp ep": (
        4,
        f"model=deepseek_v3 {NARROW} model.v_head_dim=32 {LATENT} {EXPERTS} parallel.tp=2 "
        "parallel.sequence_parallel=true parallel.ep=4",
    ),
}
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Peaks:
    """Bytes."""

    planned: float
    counted: float
    measured: float


def configuration(name: str) -> tuple[Config, Layout]:
    ranks, overrides = CASES[name]
    config = composed([*overrides.split(), *SIZES.split()])
    layout = Layout.of(config.parallel, ranks)
    batch = MICRO_BATCHES * layout.dp * config.train.micro_batch_size
    # Routing as balanced as the estimate takes it to be.
    model = replace(config.model, moe=replace(config.model.moe, force_balance=bool(config.model.moe.num_experts)))
    return replace(config, model=model, train=replace(config.train, global_batch_size=batch)), layout


def measured(world: Any, config: Config) -> float:
    """The peak of this rank's step (rank function)."""
    import torch

    from benchmarks.measurement import peak_bytes
    from training import builder

    built = builder.start(config, world, train=True)
    engine, train = built.engine, config.train
    shape = (train.micro_batch_size, train.sequence_length)
    batch = {name: torch.randint(0, config.model.vocab_size, shape) for name in ("tokens", "labels")}
    batch |= {"positions": torch.arange(shape[1]).expand(shape).contiguous(), "loss_mask": torch.ones(shape)}

    def step() -> None:
        loss = engine.forward_backward([dict(batch) for _ in range(MICRO_BATCHES)], step=1)
        engine.update(1e-5, loss=loss.item())

    step()  # makes the optimizer's states
    before = held(engine)
    # The smaller of two: gloo may let go of a message's tensor late, which is then counted a second time.
    peak = min(peak_bytes(step) for _ in range(2))
    builder.stop()
    return before + peak


def held(engine: Any) -> float:
    """Bytes of weights, gradients and optimizer states."""
    buffers = [b for chunk in engine.chunks for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    tensors = [p for module in engine.modules for p in module.parameters()] + [b.grad_data for b in buffers]
    for part in engine.optimizer.chained_optimizers:
        tensors += [v for state in part.optimizer.state.values() for v in state.values() if v.dim()]
        tensors += [p for group in part.shard_fp32_from_float16_groups for p in group]
    return float(sum(t.numel() * t.element_size() for t in tensors))


def planned(config: Config, layout: Layout) -> tuple[float, float]:
    """(by formulas, with the activations counted on the meta device), of the stage that needs most."""
    from training.memory_estimate import micro_batches_in_flight, stage_memory, stages_of
    from training.meta_step import meta_step

    bf16, both = config.precision == "bf16", []
    for stage in stages_of(config.model, layout):
        memory = stage_memory(config, layout, stage, bf16=bf16, on_gpu=False)
        found = meta_step(config, layout, stage.index, on_gpu=False, bf16=bf16)
        counted = found.activations(micro_batches_in_flight(layout, stage.index, MICRO_BATCHES))
        both.append((memory.total, memory.total - memory.activations + counted))
    return max(both)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Planned, counted and measured memory of small models on this CPU.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    names = parser.parse_args(argv).names or list(CASES)
    from parallel.local_launcher import RankPool

    print(f"{processor()}; one step of {MICRO_BATCHES} micro-batches of 2 x 512 tokens a replica, fp32; MB = 1e6 bytes")
    print(f"{'':<32} {'ranks':>5} {'measured':>10} {'planned':>10} {'':>7} {'counted':>10}")
    worst = 0.0
    with RankPool(max(CASES[name][0] for name in names)) as pool:
        for name in names:
            peaks = compare(name, pool)
            errors = [value / peaks.measured - 1 for value in (peaks.planned, peaks.counted)]
            worst = max(worst, abs(errors[0]))
            print(
                f"{name:<32} {CASES[name][0]:>5} {peaks.measured / 1e6:>7.1f} MB {peaks.planned / 1e6:>7.1f} MB "
                f"{errors[0]:>+7.1%} {peaks.counted / 1e6:>7.1f} MB {errors[1]:>+7.1%}",
                flush=True,
            )
    print(f"\nplanned: within {worst:.1%} of what is measured")
    return 0


def compare(name: str, pool: Any) -> Peaks:
    config, layout = configuration(name)
    found = pool.run(layout.world, _quietly, measured, config, timeout=300)
    by_formula, counted = pool.run(1, _quietly, _planned, config, layout, timeout=300)[0]
    return Peaks(by_formula, counted, max(found))


def _quietly(world: Any, function: Callable[..., Any], *args: Any) -> Any:
    """A rank function without the messages of frameworks."""
    from benchmarks.measurement import quietly

    with quietly():
        return function(world, *args)


def _planned(world: Any, config: Config, layout: Layout) -> tuple[float, float]:
    return planned(config, layout)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
