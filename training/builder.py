"""Builds what a command works with: ranks, device, precision, implementations and the model, from a configuration."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from conf.extensions import import_extensions
from conf.lora_layers import is_adapter
from conf.schema import PRECISIONS, Config
from models.decoder import ModelBuildContext, ModelChunk
from models.megatron_config import transformer_config
from models.objectives import objective_of
from models.operations import select_ops
from ops.run_context import RunContext
from parallel import megatron_compat, process_groups, torch_private
from parallel.distributed_optimizer import Overlap
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.process_groups import Runtime, World
from training.adapters import run_cost
from training.errors import RunFailed
from training.flops import Cost
from training.frozen import Frozen, frozen_parameters
from training.measurements import Measurements
from training.memory_estimate import optimizer_bytes, stages_of
from training.metrics import check_router_metrics
from training.start_table import Facts, memory_of_rank, start_table


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
    facts: Facts
    """For the start table."""

    @property
    def table(self) -> list[tuple[str, str, str]]:
        """(what, choice, why) for the start table."""
        return start_table(self.facts)

    @property
    def refused(self) -> frozenset[str]:
        """The rows of the table, by `what`, that say why something faster was left out."""
        return frozenset(row.operation for row in self.facts.chosen if row.refused)


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
    torch_private.set_deterministic(on)
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
        embedding=config.model.stages_share_embedding,
        amax=train and config.precision == "fp8" and config.fp8.recipe == "delayed",
    )
    precision, why_precision = choose_precision(config.precision, run.device)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if train and dtype == torch.float32:
        _refuse_bf16_gradients(config, why_precision)
    inspected = preflight(config, run, dtype) if train and config.runtime.preflight else None
    context = RunContext(config, run, dtype, train)
    ops, chosen = select_ops(context, Measurements(config.data.cache_dir, run_dir) if run_dir else None)
    core = transformer_config(
        config.model,
        run,
        dtype,
        deterministic=config.train.deterministic,
        fuse_weight_gradient=ops.fuse_weight_gradient,
    )
    build_context = ModelBuildContext(config.model, core, run, config.train.seed, ops, config.lora)

    def build_chunk(chunk: int) -> ModelChunk:
        return ModelChunk(
            build_context,
            chunk=chunk,
            sequence_length=config.train.sequence_length,
            document_mask=config.data.document_mask,
        )

    overlap = Overlap.of(config.parallel, run.backend)
    optim = config.optim if train else None
    objective = objective_of(config.train.objective, config.preference) if train else None
    trained = None if config.lora.rank is None else is_adapter
    how = (overlap, ops.adamw, frozen.names, ops.update_block, objective, trained)
    engine = Engine(core, run, optim, build_chunk, *how)
    if not train:
        for module in engine.modules:
            megatron_compat.leave_out_gradients(module)
    cost = run_cost(config)
    facts = Facts(
        config, world, run, train, precision, why_precision, chosen, ops.experts, overlap, cost, frozen, inspected
    )
    return BuiltModel(config, run, engine, precision, facts.backend, cost, facts)


def preflight(config: Config, run: Runtime, dtype: torch.dtype) -> tuple[str, str, str]:
    """A row of the start table.

    Raises:
        RunFailed: on every rank, naming the nodes that would slow the run down or end it.
    """
    from parallel.preflight import find_problems, inspect, medians

    memory = memory_of_rank(config, run, bf16=dtype == torch.bfloat16).total
    # A checkpoint: fp32 weights, and what the optimizer keeps in fp32 or bf16.
    (stage,) = stages_of(config.model, Layout(1))
    disk = 4.0 * (run_cost(config).total if config.lora.rank is None else frozen_parameters(config).trained)
    disk += optimizer_bytes(config, Layout(1), stage, bf16=False)
    reports = inspect(run, Path(config.run.dir or "runs").expanduser())
    bad = find_problems(reports, memory=memory, disk=disk)
    if bad:
        stop()
        faults = "; ".join(f"{host}: {', '.join(what)}" for host, what in bad.items())
        raise RunFailed(f"preflight: {faults}. Without them: sbatch --exclude={','.join(bad)}")
    return "preflight", f"{len({r.host for r in reports})} node(s) are well", medians(reports)


def stop() -> None:
    """Leaves the process groups and takes the CPU patches back."""
    process_groups.stop()
    megatron_compat.undo()
