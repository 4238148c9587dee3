"""Converts between the shards of Megatron-Core's distributed optimizer and logical tensors (weights and Adam's
moments).

The distributed optimizer gives every data-parallel rank a contiguous shard of the flattened gradient bucket, so that a
parameter may lie on one or on several ranks. To save, the shards of a parameter are gathered on one rank of its group,
a different one for each parameter, which distributes memory and writing. To load, every rank reads the parameters that
its shards belong to.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.block_adamw import BlockAdamW, OptimizerShard, optimizer_shards
from parallel.checkpoint_format import StoredTensor
from parallel.engine import Engine
from parallel.optimizers import OPTIMIZERS
from parallel.sharding import logical_name, sharding_of


def _optimizer_shards(engine: Engine) -> dict[nn.Parameter, OptimizerShard]:
    assert engine.optimizer is not None
    return {p: shard for part in engine.optimizer.chained_optimizers for p, shard in optimizer_shards(part).items()}


def _named(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    for module in engine.modules:
        for name, parameter in module.named_parameters():
            yield logical_name(name, parameter), parameter


def is_stored(engine: Engine, name: str, parameter: nn.Parameter) -> bool:
    """Whether a checkpoint of this run holds the parameter. One of adapters holds these, and state that is set by a
    rule; the other weights are those of its base."""
    return engine.is_adapter is None or engine.is_adapter(name) or sharding_of(parameter).is_state


def moments(engine: Engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter, as prefixes of a checkpoint's tensors."""
    return () if engine.optim is None else OPTIMIZERS[engine.optim.name].state_of(parameter)


def logical_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The logical shape of every parameter of which this rank holds a shard."""
    return {name: sharding_of(p).logical_shape(p.shape) for name, p in _named(engine)}


def states(engine: Engine) -> list[str]:
    """Names of this rank's parameters that are set by a rule (Sharding.is_state)."""
    return [name for name, p in _named(engine) if sharding_of(p).is_state]


def expected_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The logical shape of every checkpoint tensor of which this rank holds a shard. Parameters without a gradient have
    no moments."""
    return {
        f"{kind}.{name}": sharding_of(p).logical_shape(p.shape)
        for name, p in _named(engine)
        if is_stored(engine, name, p)
        for kind in (("weights", *moments(engine, p)) if p.requires_grad else ("weights",))
    }


def counted_updates(engine: Engine) -> int:
    """The number of updates that this rank's part of the optimizer has counted; 0 if it is empty."""
    counts = [0]
    for shard in _optimizer_shards(engine).values():
        group = next((g for g in shard.inner.param_groups if "step" in g), {})  # ours, Apex's, TransformerEngine's
        counts.append(int(shard.inner.state.get(shard.master, {}).get("step", group.get("step", 0))))
    return max(counts)


def first_nonfinite(engine: Engine) -> str | None:
    """The first tensor of weights or moments that holds a NaN or an infinity, as "exp_avg of layers.0....", or None.
    Every rank calls this together, checks its own shards and gets the same answer."""
    shards, mine = _optimizer_shards(engine), None
    for name, parameter in _named(engine):
        shard = shards.get(parameter)
        state = shard.inner.state.get(shard.master, {}) if shard else {}
        # A checkpoint holds the master weights where there are any; bf16 weights are rounded from them.
        parts = {
            "weights": shard.master if shard else parameter,
            **{m: state[m] for m in moments(engine, parameter) if m in state},
        }
        mine = next((f"{kind} of {name}" for kind, part in parts.items() if not torch.isfinite(part).all()), None)
        if mine:
            break
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(filter(None, found), None)


def _sharded(key: str, local: Tensor, parameter: nn.Parameter) -> Any:
    """Megatron-Core's ShardedTensor for this rank's shard of a logical tensor."""
    from megatron.core.dist_checkpointing import ShardedTensor

    offsets = [(axis, group.rank(), group.size()) for axis, group in sharding_of(parameter).sharded_dims]
    return ShardedTensor.from_rank_offsets(key, local, *offsets)


def _assemble(
    engine: Engine,
    parameter: nn.Parameter,
    part: Tensor | None,
    shard: OptimizerShard | None,
    owner: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gathers a parameter's master weights or one of its moments on rank `owner` of its group. On the other ranks the
    result is undefined."""
    groups = engine.runtime.groups
    group = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.edp
    whole = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    if part is not None and shard is not None:
        whole[shard.start : shard.end] = part
    if group.size() > 1:
        # Every element is nonzero on one rank at most, so the sum is exact.
        dist.reduce(whole, group_dst=owner % group.size(), group=group)
    return whole.view(parameter.shape)


def to_save(engine: Engine) -> dict[str, Any]:
    """The tensors that this rank writes to a checkpoint, on the CPU: those of the parameters that it owns."""
    shards, tensors = _optimizer_shards(engine), {}
    groups = engine.runtime.groups
    moment_dtype = torch.bfloat16 if engine.optim is not None and engine.optim.state_dtype == "bf16" else torch.float32
    for index, (name, parameter) in enumerate(_named(engine)):
        if not is_stored(engine, name, parameter):
            continue
        group = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.edp
        if not parameter.requires_grad:  # complete on every rank, and in no optimizer
            if group.rank() == index % group.size() and sharding_of(parameter).is_first_replica():
                copy = parameter.detach().cpu().clone()  # written while training continues
                tensors[f"weights.{name}"] = _sharded(f"weights.{name}", copy, parameter)
            continue
        shard = shards.get(parameter)
        state = shard.inner.state.get(shard.master, {}) if shard else {}
        parts = {"weights": shard.master if shard else None, **{m: state.get(m) for m in moments(engine, parameter)}}
        for kind, part in parts.items():
            dtype = torch.float32 if kind == "weights" else moment_dtype
            whole = _assemble(engine, parameter, part, shard, index, dtype)
            if group.rank() == index % group.size() and sharding_of(parameter).is_first_replica():
                tensors[f"{kind}.{name}"] = _sharded(f"{kind}.{name}", whole.detach().cpu(), parameter)
    return tensors


def weights_to_load(engine: Engine) -> dict[str, Any]:
    """Uninitialized fp32 tensors for this rank's shard of every parameter."""
    keys = {f"weights.{name}": p for name, p in _named(engine)}
    return {key: _sharded(key, torch.empty(p.shape), p) for key, p in keys.items()}


def to_load(engine: Engine) -> dict[str, Any]:
    """Uninitialized fp32 tensors for the moments of the parameters of which this rank holds optimizer shards."""
    shards, tensors = _optimizer_shards(engine), {}
    for name, parameter in _named(engine):
        if parameter in shards:
            for kind in moments(engine, parameter):
                key = f"{kind}.{name}"
                tensors[key] = _sharded(key, torch.empty(parameter.shape), parameter)
    return tensors


def check_stored(engine: Engine, wanted: dict[str, Any], directory: Path, stored: dict[str, StoredTensor]) -> None:
    """Raises ValueError where a checkpoint does not hold what `to_load` asks for."""
    named = [key.partition(".") for key in stored]
    kept = {kind for kind, _, name in named if kind != "weights" and f"weights.{name}" in stored}
    if wanted and not kept:
        raise ValueError(
            f"{directory} holds weights without optimizer states, as launch.import_hf writes them: start a new run "
            f"from it with checkpoint.load={directory.parent.parent}"
        )
    if not wanted:
        return
    assert engine.optim is not None
    kinds = OPTIMIZERS[engine.optim.name].kinds
    if not {key.partition(".")[0] for key in wanted} <= kept <= set(kinds):
        raise ValueError(
            f"{directory} is of another optimizer, which keeps {', '.join(sorted(kept))}; "
            f"optim.name={engine.optim.name} keeps {', '.join(kinds)}: take the run's optim.name, or start "
            f"a new run from its weights with checkpoint.load={directory.parent.parent}"
        )
    for key, box in wanted.items():
        if key not in stored or stored[key].shape != tuple(box.global_shape):
            raise ValueError(f"{directory} is of another model: it has no {key} of shape {tuple(box.global_shape)}")


@torch.no_grad()
def restore_master(engine: Engine, loaded: dict[str, Tensor]) -> None:
    """Copies loaded fp32 weights into the optimizer's master weights."""
    if engine.optimizer is None:
        return
    shards = _optimizer_shards(engine)
    for name, parameter in _named(engine):
        if (shard := shards.get(parameter)) and f"weights.{name}" in loaded:
            shard.master.copy_(loaded[f"weights.{name}"].flatten()[shard.start : shard.end])


@torch.no_grad()
def restore(engine: Engine, loaded: dict[str, Tensor], *, updates: int) -> None:
    """Restores the optimizer's moments.

    Args:
        updates: number of updates applied so far, used in Adam's bias correction.
    """
    if updates == 0:
        return
    shards = _optimizer_shards(engine)
    for name, parameter in _named(engine):
        if not (shard := shards.get(parameter)):
            continue
        state = {m: loaded[f"{m}.{name}"].flatten()[shard.start : shard.end] for m in moments(engine, parameter)}
        if isinstance(shard.inner, BlockAdamW):
            shard.inner.set_moments(shard.master, state)
            continue
        state = {m: moment.to(parameter.device) for m, moment in state.items()}
        if isinstance(shard.inner, torch.optim.AdamW):
            # A separate tensor for every parameter: AdamW increments it in place.
            state["step"] = torch.tensor(float(updates), device=parameter.device)
        shard.inner.state[shard.master] = {k: v.clone() for k, v in state.items()}
    for inner in {shard.inner for shard in shards.values()}:
        if not isinstance(inner, torch.optim.AdamW):  # the others count updates per parameter group
            for group in inner.param_groups:
                group["step"] = updates
