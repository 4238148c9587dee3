"""`python -m benchmarks.moe_layer`: compares a sparse layer, forward and backward, with a dense layer of the same
active parameters, Megatron-Core's MoELayer and Transformers' Mixtral block, all dropless top-1 SwiGLU on the same
tokens. Routing is that of an untrained router, and beside it force-balanced (`model.moe.force_balance`, Megatron-Core's
`moe_router_force_load_balancing`), which is how most published speeds were measured.

Legend: T tokens, D hidden, F expert hidden.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measurement import Implementation, Result, peak_bytes, saved_bytes, table, version
from benchmarks.peers import megatron_config
from benchmarks.workers import AS_OURS, Measurements, alternate, start_workers, timed
from conf.schema import Config, ModelConfig, MoeConfig
from parallel.megatron_compat import moe_layer

OURS, DENSE, BOUNDED = "switchyard", "dense", "expert_chunk_rows"
MEGATRON = ("megatron",)
FORCED = "switchyard balanced"
BALANCED = {FORCED: OURS, "megatron balanced": MEGATRON[0]}
"""With force-balanced routing, by what they are otherwise."""
TRANSFORMERS = ("transformers eager", "transformers grouped_mm")


class SwiGLU(nn.Module):
    """The dense layer with the same FLOPs per token as one expert."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def model_config(args: argparse.Namespace, experts: int, *, balanced: bool = False) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=args.hidden,
        ffn_hidden_size=args.width,
        activation="swiglu",
        moe=MoeConfig(num_experts=experts, top_k=1, capacity_factor=None, backend=args.backend, force_balance=balanced),
    )


def build_ours(model: ModelConfig, runtime, dtype: torch.dtype) -> nn.Module:
    from models.init import initialise
    from models.operations import select_ops
    from moe.layer import MoELayer
    from ops.run_context import RunContext

    ops, _ = select_ops(RunContext(Config(model=model), runtime, dtype, train=False))
    layer = MoELayer(model, ops=ops, dtype=dtype, sequence_parallel=False, groups=runtime.groups, draws=(1, 0))
    initialise(layer.to(runtime.device), seed=1)
    return layer


def build_megatron(model: ModelConfig) -> nn.Module:
    return moe_layer(megatron_config(model))


def build_transformers(model: ModelConfig, dtype: torch.dtype, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=1,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def implementation(layer: nn.Module, inputs: list[Tensor], grad_SBD: Tensor) -> Implementation:
    """Each step uses the next of the inputs [S, B, D], so that row counts per expert differ between steps, as in
    training: kernels that are compiled per shape are compiled again."""
    next_inputs = itertools.cycle(inputs)

    def forward() -> Tensor:
        out = layer(next(next_inputs).detach().requires_grad_())
        return out[0] if isinstance(out, tuple) else out

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        forward().backward(grad_SBD)

    return Implementation(step, forward)


def half_to_one_expert(layer: nn.Module, x_SBD: Tensor) -> Tensor:
    """Inputs of which exactly every second token is routed to expert 0, by their first feature."""
    router = layer.gate if hasattr(layer, "gate") else layer.router
    with torch.no_grad():
        router.weight[:, 0] = 0
        router.weight[0] = 0
        router.weight[0, 0] = 8
    named = x_SBD.clone()
    named[0::2, :, 0], named[1::2, :, 0] = 8, -8
    return named


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak bytes of a forward and backward pass, without inputs and weights."""

    even: int
    skewed: int | None
    """If one expert gets half of the tokens. None: there are no experts."""


def build(name: str, args: argparse.Namespace) -> Measurements:
    """Builds an implementation with each number of experts, in the calling process."""
    from parallel import process_groups
    from parallel.env import World
    from parallel.layout import Layout

    run = process_groups.start(World(), Layout(1), seed=1, timeout=60)
    generator = torch.Generator().manual_seed(0)
    grad_SBD, *inputs = (
        torch.randn(args.tokens, 1, args.hidden, generator=generator).to(run.device, torch.bfloat16)
        for _ in range(args.repetitions + 2)
    )
    measurements: dict[str, Callable[[], Any]] = {}
    for experts in args.experts:
        layer = build_layer(name, args, experts, run).to(run.device)
        built = implementation(layer, inputs, grad_SBD)
        measurements[f"seconds {experts}"] = timed(built.step)
        measurements[f"saved {experts}"] = functools.partial(saved_bytes, built.forward)
        measurements[f"peak {experts}"] = functools.partial(peak, layer, inputs[0], grad_SBD)
    return measurements


def build_layer(name: str, args: argparse.Namespace, experts: int, run: Any) -> nn.Module:
    model, dtype = model_config(args, experts, balanced=name in BALANCED), torch.bfloat16
    name = BALANCED.get(name, name)
    if name == OURS:
        return build_ours(model, run, dtype)
    if name == BOUNDED:
        model.moe.expert_chunk_rows = args.chunk_rows
        return build_ours(model, run, dtype)
    if name == DENSE:
        return SwiGLU(args.hidden, args.width).to(dtype)
    if name in MEGATRON:
        return build_megatron(model)
    return build_transformers(model, dtype, name.split()[1])


def peak(layer: nn.Module, x_SBD: Tensor, grad_SBD: Tensor) -> Peak:
    """Measures the peak memory. Changes the router's weight."""

    def measured(x: Tensor) -> int:
        layer.zero_grad(set_to_none=True)  # otherwise freeing gradients of an earlier pass would count
        return peak_bytes(implementation(layer, [x], grad_SBD).step)

    return Peak(measured(x_SBD), None if isinstance(layer, SwiGLU) else measured(half_to_one_expert(layer, x_SBD)))


Outcome = tuple[dict[str, Result], dict[str, Peak]]


def compare(args: argparse.Namespace) -> dict[int, Outcome]:
    """The results of all implementations, by number of experts."""
    names = (OURS, DENSE, *MEGATRON, *(TRANSFORMERS if version("transformers") else ()), *BALANCED)
    builds = {name: functools.partial(build, name, args) for name in (*names, BOUNDED)}
    found: dict[int, Outcome] = {}
    with start_workers(
        builds, (OURS, DENSE, BOUNDED, "switchyard balanced"), peers_as_ours=args.peers_as_ours
    ) as workers:
        timed_workers = {name: workers[name] for name in names}
        seconds = {n: alternate(timed_workers, f"seconds {n}", args.repetitions) for n in args.experts}
        for n in args.experts:
            results = {name: Result(seconds[n][name], workers[name].measure(f"saved {n}")) for name in names}
            peaks = {name: w.measure(f"peak {n}") for name, w in workers.items() if name not in BALANCED}
            peaks[f"{OURS}, {BOUNDED}={args.chunk_rows}"] = peaks.pop(BOUNDED)
            found[n] = results, peaks
    return found


def fastest(results: dict[str, Result], names: tuple[str, ...]) -> float | None:
    """Seconds of the fastest of several variants. None: none of them ran."""
    return min((results[n].seconds for n in names if n in results), default=None)


def summary(by_experts: dict[int, dict[str, Result]]) -> dict[str, object]:
    """ratio_dense: our time over the dense layer's, by number of experts. ratio_balanced: our time with force-balanced
    routing over that with the router's, likewise. The others: the time of the fastest variant of another implementation
    over ours, at the first number of experts; null if it is not installed."""
    first = next(iter(by_experts.values()))
    peers = {"ratio_megatron": fastest(first, MEGATRON), "ratio_transformers": fastest(first, TRANSFORMERS)}
    dense = {str(n): round(r[OURS].seconds / r[DENSE].seconds, 3) for n, r in by_experts.items()}
    forced = {str(n): round(r[FORCED].seconds / r[OURS].seconds, 3) for n, r in by_experts.items()}
    others = {name: s and round(s / first[OURS].seconds, 3) for name, s in peers.items()}
    return {"ratio_dense": dense, "ratio_balanced": forced} | others


def mib(size: int) -> float:
    return round(size / 2**20, 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares a sparse layer with other implementations.")
    parser.add_argument("--json", action="store_true", help="print the ratios as one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048, help="hidden size of an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--chunk-rows", type=int, default=512, help="model.moe.expert_chunk_rows of the bounded layer")
    parser.add_argument("--backend", default="auto", help="model.moe.backend of our layer")
    parser.add_argument("--peers-as-ours", action="store_true", help=AS_OURS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = compare(args)
    if not args.json:
        print(f"{args.tokens} tokens, hidden {args.hidden}, width {args.width}, top-1, bf16")
        for experts, (results, memory) in found.items():
            print(f"{experts} experts\n{table(results, lambda s: f'{s * 1e3:.1f} ms')}")
            print("  peak memory of a forward and backward pass: tokens distributed, and half of them to one expert")
            for name, peak in memory.items():
                skewed = "" if peak.skewed is None else f"{mib(peak.skewed):8.0f} MiB"
                print(f"  {name:36} {mib(peak.even):8.0f} MiB {skewed}".rstrip())
        if not version("transformers"):
            print("transformers: skipped, not installed (pip install transformers)")
    report = summary({experts: results for experts, (results, _) in found.items()})
    first = next(iter(found.values()))[1]
    report["peak_mib"] = {name: [mib(peak.even), peak.skewed and mib(peak.skewed)] for name, peak in first.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
