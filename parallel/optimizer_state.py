"""Converts between the shards of Megatron-Core's distributed optimizer and logical tensors (weights and Adam's
moments).

The distributed optimizer gives every data-parallel rank a contiguous shard of the flattened gradient bucket, so that a
parameter may lie on one or on several ranks. To save, the shards of a parameter are gathered on one rank of its group,
a different one for each parameter, which distributes memory and writing (parallel/checkpoint_plan.py). To load, one
rank of a group reads a parameter and broadcasts it (parallel/weight_loading.py).
"""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.block_adamw import BlockAdamW, OptimizerShard, optimizer_shards
from parallel.checkpoint_exchange import gather_to_owners
from parallel.checkpoint_format import StoredTensor
from parallel.checkpoint_plan import Part, SavePlan, made_plan, writers_wanted, writing_ranks
from parallel.engine import Engine
from parallel.first_found import first_found
from parallel.megatron_compat import shard_ranges
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
    return first_found(mine, engine.runtime.device)


def _sharded(key: str, local: Tensor, parameter: nn.Parameter) -> Any:
    """Megatron-Core's ShardedTensor for this rank's shard of a logical tensor."""
    from megatron.core.dist_checkpointing import ShardedTensor

    offsets = [(axis, group.rank(), group.size()) for axis, group in sharding_of(parameter).sharded_dims]
    return ShardedTensor.from_rank_offsets(key, local, *offsets)


def _saved_kinds(engine: Engine, parameter: nn.Parameter) -> dict[str, torch.dtype]:
    """What a checkpoint holds of a parameter, and the dtypes."""
    if not parameter.requires_grad:
        return {"weights": parameter.dtype}
    bf16 = engine.optim is not None and engine.optim.state_dtype == "bf16"
    moment_dtype = torch.bfloat16 if bf16 else torch.float32
    return {"weights": torch.float32, **dict.fromkeys(moments(engine, parameter), moment_dtype)}


def _spans(chunk: Any, parameter: nn.Parameter, owner: int) -> tuple[tuple[int, int, int], ...] | None:
    """Part.spans, of the ranks of the owner's optimizer instance."""
    if not parameter.requires_grad:
        return None
    ranges = shard_ranges(chunk, parameter)
    first = owner // len(ranges) * len(ranges)
    return tuple((first + rank, *span) for rank, span in enumerate(ranges) if span[0] < span[1])


_plans: "weakref.WeakKeyDictionary[Engine, SavePlan]" = weakref.WeakKeyDictionary()


def save_plan(engine: Engine) -> SavePlan:
    """Which rank writes what to the checkpoints of an engine: made when it is asked for the first time, which every
    rank does together."""
    if engine in _plans:
        return _plans[engine]
    groups, device = engine.runtime.groups, engine.runtime.device
    # The numbers of all parameters, so that those of a replica group have the same owners on all of its ranks.
    saved = [
        (index, name, p)
        for index, (name, p) in enumerate(_named(engine))
        if is_stored(engine, name, p) and sharding_of(p).is_first_replica()
    ]
    dense = {p: getattr(p, "allreduce", True) for _, _, p in saved}
    sizes = {p: p.numel() * sum(dtype.itemsize for dtype in _saved_kinds(engine, p).values()) for p in dense}
    largest = max(sum(size for p, size in sizes.items() if dense[p] == part) for part in (True, False))
    writers = torch.tensor(writers_wanted(largest), device=device)
    dist.all_reduce(writers, op=dist.ReduceOp.MAX)
    chunk_of = {p: chunk for chunk, m in zip(engine.chunks, engine.modules, strict=True) for p in m.parameters()}
    families: list[tuple[dist.ProcessGroup, tuple[Part, ...]]] = []
    for group, is_dense in ((groups.dp_cp, True), (groups.edp, False)):
        owners = writing_ranks(group.size(), int(writers.item()))
        parts: list[Part] = []
        for index, name, p in saved:
            if dense[p] == is_dense:
                owner = owners[index % len(owners)]
                spans = _spans(chunk_of[p], p, owner)
                for kind, dtype in _saved_kinds(engine, p).items():
                    place = _sharded(f"{kind}.{name}", torch.empty(p.shape, dtype=dtype, device="meta"), p)
                    shape, offset = tuple(place.global_shape), tuple(place.global_offset)
                    parts.append(Part(place.key, kind, p, dtype, shape, offset, spans, owner))
        families.append((group, tuple(parts)))
    plan = made_plan(engine.runtime, families, int(writers.item()), expected_shapes(engine))
    return _plans.setdefault(engine, plan)


def to_save(engine: Engine) -> dict[str, Any]:
    """The tensors that this rank writes to a checkpoint, on the CPU: those of the parameters that it owns. Every rank
    calls this together."""
    shards, device = _optimizer_shards(engine), engine.runtime.device

    def values(part: Part) -> Tensor | None:
        if (shard := shards.get(part.parameter)) is None:
            return None
        return shard.master if part.kind == "weights" else shard.inner.state.get(shard.master, {}).get(part.kind)

    tensors: dict[str, Any] = {}
    for group, parts in save_plan(engine).families:
        trained = [part for part in parts if part.spans is not None]
        found = gather_to_owners(trained, values, group, device)
        for part in parts:
            if part.owner == group.rank():
                # A copy of a frozen parameter: it is written while training continues.
                local = part.parameter.detach().cpu().clone() if part.spans is None else found[part.key]
                tensors[part.key] = _sharded(part.key, local, part.parameter)
    return tensors


def weights_to_load(engine: Engine) -> dict[str, Any]:
    """This rank's shard of every parameter, without data."""
    keys = {f"weights.{name}": p for name, p in _named(engine)}
    return {key: _sharded(key, torch.empty(p.shape, device="meta"), p) for key, p in keys.items()}


def to_load(engine: Engine) -> dict[str, Any]:
    """This rank's shard of what the optimizer keeps of every parameter that is trained, without data. The ranks of a
    replica group have the same, of which each needs a part."""
    return {
        (key := f"{kind}.{name}"): _sharded(key, torch.empty(parameter.shape, device="meta"), parameter)
        for name, parameter in _named(engine)
        if parameter.requires_grad and engine.optimizer is not None
        for kind in moments(engine, parameter)
    }


def replica_groups(engine: Engine) -> dict[str, dist.ProcessGroup]:
    """Name -> the ranks that hold the same shard of a parameter, or parts of it: dp_cp, or of experts edp."""
    groups = engine.runtime.groups
    return {name: groups.dp_cp if getattr(p, "allreduce", True) else groups.edp for name, p in _named(engine)}


def own_part(engine: Engine) -> Callable[[str, Tensor], Tensor | None]:
    """A function that returns this rank's part of a tensor of `to_load`, on the CPU; None: it has none."""
    shards = _optimizer_shards(engine)
    spans = {name: (shards[p].start, shards[p].end) for name, p in _named(engine) if p in shards}

    def part(key: str, tensor: Tensor) -> Tensor | None:
        span = spans.get(key.partition(".")[2])
        return None if span is None else tensor.flatten()[slice(*span)].to("cpu", copy=True)

    return part


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
        loaded: this rank's parts, as `own_part` returns them.
        updates: number of updates applied so far, used in Adam's bias correction.
    """
    if updates == 0:
        return
    shards = _optimizer_shards(engine)
    for name, parameter in _named(engine):
        if not (shard := shards.get(parameter)):
            continue
        state = {m: loaded[f"{m}.{name}"] for m in moments(engine, parameter)}
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
