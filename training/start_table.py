"""The table that a run prints at its start: what was chosen, and why."""

import platform
from dataclasses import dataclass

import torch

from conf.lora_layers import adapted_layers
from conf.schema import Config
from ops.adapted_experts import loop_product
from ops.experts import EXPERTS, ExpertBackend
from ops.operation import Row
from parallel.device_env import device_variables
from parallel.distributed_optimizer import Overlap
from parallel.layout import Layout, groups_across_nodes
from parallel.process_groups import Runtime, World
from parallel.threads import thread_wait_policy
from training.flops import Cost
from training.frozen import Frozen
from training.memory_estimate import Memory, memory_per_rank
from training.run_summary import memory_row


@dataclass(frozen=True)
class Facts:
    """What is known of a rank once it is built."""

    config: Config
    world: World
    runtime: Runtime
    train: bool
    precision: str
    """fp32, bf16 or fp8."""
    why_precision: str
    chosen: list[Row]
    """The implementations."""
    experts: ExpertBackend
    overlap: Overlap
    cost: Cost
    frozen: Frozen
    preflight: tuple[str, str, str] | None
    """Its row; None: it was not made."""

    @property
    def backend(self) -> str | None:
        """How the products of the experts in bf16 or fp32 run; None: there are none."""
        return next((row.name for row in self.chosen if row.operation == EXPERTS.name), None)


def start_table(facts: Facts) -> list[tuple[str, str, str]]:
    """(what, choice, why) of every row, in order."""
    config, layout = facts.config, facts.runtime.layout
    rows = [*_device_rows(facts.runtime), ("precision", facts.precision, facts.why_precision)]
    rows += _layout_rows(layout, facts.world)
    rows += [facts.preflight] if facts.preflight else []
    rows += [(row.operation, row.name, row.why) for row in facts.chosen]
    rows += _adapters_row(facts)
    model = ("model", *_model_words(config, facts.cost))
    if not facts.train:
        return [*rows, model]
    rows += _recompute_row(config.model.recompute, facts.backend, facts.experts)
    if max(layout.dp * layout.cp, layout.edp) > 1:
        rows += [_overlap_row(facts.overlap, config.parallel.overlap_grad_reduce)]
    rows += [model]
    if config.model.moe.force_balance:
        rows += [("routing", "FORCED BALANCE", "model.moe.force_balance: for benchmarks; the model learns no routing")]
    if facts.frozen.total:
        rows += [("trained", *facts.frozen.describe())]
    if config.cluster.memory_gb:
        memory = memory_of_rank(config, facts.runtime, bf16=facts.precision != "fp32")
        rows += [memory_row(memory, config.cluster)]
    return rows


def memory_of_rank(config: Config, run: Runtime, *, bf16: bool) -> Memory:
    """The memory estimate for the device that the run is on."""
    return memory_per_rank(config, run.layout, bf16=bf16, on_gpu=run.device.type == "cuda")


def _device_rows(run: Runtime) -> list[tuple[str, str, str]]:
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30
        how = "NCCL" if run.backend == "nccl" else "shared by simulated ranks; gloo through host memory"
        return [
            ("device", torch.cuda.get_device_name(run.device), f"{memory:.0f} GiB, {how}"),
            ("environment", device_variables(), "read by CUDA and its allocator when they start"),
        ]
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    wait, why = thread_wait_policy()
    rows = [
        ("device", f"CPU ({name})", "no CUDA device; gloo"),
        ("threads", f"{torch.get_num_threads()} a rank, {wait}", why),
    ]
    return rows + ([("memory", *run.memory)] if run.memory else [])


def _layout_rows(layout: Layout, world: World) -> list[tuple[str, str, str]]:
    if world.size == 1:
        return []
    rows = [("ranks", f"{layout.world}", layout.describe())]
    if world.local_size < world.size:
        nodes = f"{-(-world.size // world.local_size)} of {world.local_size} ranks"
        apart = "; ".join(groups_across_nodes(layout, world.local_size))
        rows += [("nodes", nodes, apart or "tensor, context and expert groups lie within a node")]
    return rows


def _adapters_row(facts: Facts) -> list[tuple[str, str, str]]:
    layers = adapted_layers(facts.config.model, facts.config.lora)
    if not layers:
        return []
    why = "their scale is alpha / sqrt(rank)" if facts.config.lora.rslora else "their scale is alpha / rank"
    why += "; DoRA: rows have lengths of their own" if facts.config.lora.dora else ""
    if any(layer.experts for layer in layers) and facts.backend:
        product = (
            "of one expert after the other" if facts.experts.adapted.product is loop_product else f"by {facts.backend}"
        )
        why += f"; with adapters {facts.backend} does not compute whole experts: products {product}"
    return [("adapters", f"rank {facts.config.lora.rank} of {len(layers)} layers", why)]


def _recompute_row(parts: list[str], backend: str | None, experts: ExpertBackend) -> list[tuple[str, str, str]]:
    why = f"{backend} experts keep no activations anyway" if experts.recomputes_activation else "as asked for"
    return [("recompute", ", ".join(parts), why if "activation" in parts else "as asked for")] if parts else []


def _overlap_row(overlap: Overlap, wanted: bool | None) -> tuple[str, str, str]:
    parts = {"gradients": overlap.grad_reduce, "weights": overlap.param_gather}
    chosen = " and ".join(name for name, on in parts.items() if on) or "none"
    why = "the network works beside the GPU" if overlap.grad_reduce else "the cores that compute also send"
    return "overlap", chosen, why if wanted is None else "asked for"


def _model_words(config: Config, cost: Cost) -> tuple[str, str]:
    moe = config.model.moe
    shape = f"{config.model.name}: {cost.total / 1e6:.1f} M parameters, {cost.active / 1e6:.1f} M active per token"
    if not moe.num_experts:
        return shape, "dense"
    where = "every layer" if moe.every == 1 else f"one layer in {moe.every}"
    where += f" after the first {moe.first_dense_layers}" if moe.first_dense_layers else ""
    choice = f"top-{moe.top_k}"
    if moe.load_balancing == "sinkhorn":
        choice += " of a balanced plan"
    elif moe.load_balancing == "expert_choice":
        choice = f"each takes its best tokens, {moe.top_k * moe.capacity_factor:g} experts a token on average"
    return shape, f"{moe.num_experts} experts in {where}, {choice}"
