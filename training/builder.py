"""Builds what a command works with: ranks, device, precision, implementations and the model, from a configuration."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from conf.extensions import import_extensions, kept_tensors
from conf.schema import PRECISIONS, Config
from models.decoder import ModelBuildContext, ModelChunk
from models.megatron_config import transformer_config
from models.operations import select_ops
from ops.experts import EXPERTS, ExpertBackend
from ops.run_context import RunContext
from parallel import megatron_compat, process_groups
from parallel.device_env import device_variables
from parallel.engine import Engine, Overlap
from parallel.layout import Layout, groups_across_nodes
from parallel.process_groups import Runtime, World
from parallel.threads import thread_wait_policy
from training.errors import RunFailed
from training.flops import Cost, model_cost
from training.frozen import Frozen, frozen_parameters
from training.measurements import Measurements
from training.memory_estimate import Memory, memory_per_rank
from training.metrics import check_router_metrics
from training.run_summary import memory_row


@dataclass(frozen=True)
class BuiltModel:
    """A started rank with its part of the model."""

    config: Config
    runtime: Runtime
    engine: Engine
    precision: str
    """fp32, bf16 or fp8."""
    backend: str | None
    """How the products of the experts in bf16 or fp32 run; None: there are none."""
    cost: Cost
    table: list[tuple[str, str, str]]
    """(what, choice, why) for the start table."""
    refused: frozenset[str] = frozenset()
    """The rows of the table, by `what`, that say why something faster was left out."""


def bf16_support(device: torch.device) -> tuple[bool, str]:
    """Whether the processor has bf16 arithmetic, in words."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return has, f"the GPU has {'' if has else 'no '}bf16 arithmetic"
    # oneDNN also runs bf16 where the processor only emulates it, which is slower than fp32.
    capabilities = torch.cpu.get_capabilities()
    has = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return has, f"the processor has {'' if has else 'no '}bf16 arithmetic"


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, why) for the setting `precision`.

    Raises:
        ValueError: an unknown one, or bf16 on a GPU without it.
    """
    if wanted not in PRECISIONS:
        raise ValueError(f"precision={wanted} is not one of {', '.join(PRECISIONS)}; the nearest is bf16")
    has, why = bf16_support(device)
    if wanted == "auto":
        return ("bf16" if has else "fp32"), why
    if wanted in ("bf16", "fp8") and not has and device.type == "cuda":
        raise ValueError(f"precision={wanted}: {why}; use precision=fp32")
    return wanted, "asked for" if has or wanted == "fp32" else f"asked for; {why}: slower than fp32"


def _refuse_bf16_gradients(config: Config, why_fp32: str) -> None:
    """Of parameters in fp32, which precision=auto may have come to. Raises ValueError."""
    if config.optim.grad_dtype == "bf16":
        raise ValueError(
            f"optim.grad_dtype=bf16 needs parameters in bf16, but precision={config.precision} is fp32 here "
            f"({why_fp32}); nearest: optim.grad_dtype=fp32 or precision=bf16"
        )


def set_deterministic(on: bool) -> None:
    """Only algorithms that give the same bits every time. Called before the device is used."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def start(
    config: Config, world: World, *, train: bool, run_dir: Path | None = None, store: dist.Store | None = None
) -> BuiltModel:
    """Joins the other ranks and builds this rank's part of the model with its initial weights.

    Args:
        train: with gradient buckets and optimizer.
        run_dir: where a training run is or will be kept; None: nothing is measured and kept.
        store: of ranks that have met already.

    Raises:
        ValueError: a setting that this device cannot serve.
    """
    import_extensions(config.extensions)
    check_router_metrics()
    frozen = frozen_parameters(config) if train else Frozen()  # before ranks meet
    set_deterministic(config.train.deterministic)
    layout = Layout.of(config.parallel, world.size)
    run = process_groups.start(
        world,
        layout,
        seed=config.train.seed,
        timeout=config.runtime.timeout,
        threads=config.runtime.threads,
        store=store,
    )
    precision, why_precision = choose_precision(config.precision, run.device)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if train and dtype == torch.float32:
        _refuse_bf16_gradients(config, why_precision)
    rows = [*_device_rows(run), ("precision", precision, why_precision), *_layout_rows(layout, world)]
    if train and config.runtime.preflight:
        rows += [preflight(config, run, dtype)]
    context = RunContext(config, run, dtype, train)
    ops, chosen = select_ops(context, Measurements(config.data.cache_dir, run_dir) if run_dir else None)
    rows += [(row.operation, row.name, row.why) for row in chosen]
    backend = next((row.name for row in chosen if row.operation == EXPERTS.name), None)
    if train:
        rows += _recompute_row(config.model.recompute, backend, ops.experts)

    core = transformer_config(config.model, run, dtype, deterministic=config.train.deterministic)
    build_context = ModelBuildContext(config.model, core, run, config.train.seed, ops)

    def build_chunk(chunk: int) -> ModelChunk:
        return ModelChunk(
            build_context,
            chunk=chunk,
            sequence_length=config.train.sequence_length,
            document_mask=config.data.document_mask,
        )

    overlap = Overlap.of(config.parallel, run.backend)
    if train and max(layout.dp * layout.cp, layout.edp) > 1:
        rows += [_overlap_row(overlap, config.parallel.overlap_grad_reduce)]
    optim = config.optim if train else None
    engine = Engine(core, run, optim, build_chunk, overlap, ops.adamw, frozen.names, ops.update_block)
    cost = model_cost(config.model, config.train.sequence_length)
    rows += [("model", *_model_words(config, cost))]
    if train and config.model.moe.force_balance:
        rows += [("routing", "FORCED BALANCE", "model.moe.force_balance: for benchmarks; the model learns no routing")]
    if train and frozen.names:
        rows += [("trained", *frozen.describe())]
    if train and config.cluster.memory_gb:
        rows += [memory_row(_memory(config, run, dtype), config.cluster)]
    refused = frozenset(row.operation for row in chosen if row.refused)
    return BuiltModel(config, run, engine, precision, backend, cost, rows, refused)


def _memory(config: Config, run: Runtime, dtype: torch.dtype) -> Memory:
    return memory_per_rank(config, run.layout, bf16=dtype == torch.bfloat16, on_gpu=run.device.type == "cuda")


def preflight(config: Config, run: Runtime, dtype: torch.dtype) -> tuple[str, str, str]:
    """A row of the start table.

    Raises:
        RunFailed: on every rank, naming the nodes that would slow the run down or end it.
    """
    from parallel.preflight import find_problems, inspect, medians

    memory = _memory(config, run, dtype).total
    # A checkpoint: fp32 weights, and what the optimizer keeps in fp32 or bf16.
    bytes_each = 4.0 + kept_tensors(config.optim.name) * (2.0 if config.optim.state_dtype == "bf16" else 4.0)
    disk = bytes_each * model_cost(config.model, config.train.sequence_length).total
    reports = inspect(run, Path(config.run.dir or "runs").expanduser())
    bad = find_problems(reports, memory=memory, disk=disk)
    if bad:
        stop()
        told = "; ".join(f"{host}: {', '.join(what)}" for host, what in bad.items())
        raise RunFailed(f"preflight: {told}. Without them: sbatch --exclude={','.join(bad)}")
    return "preflight", f"{len({r.host for r in reports})} node(s) are well", medians(reports)


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


def stop() -> None:
    """Leaves the process groups and takes the CPU patches back."""
    process_groups.stop()
    megatron_compat.undo()
