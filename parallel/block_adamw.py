"""The optimizers of parallel/optimizers.py, with less GPU memory if wanted: moments in bf16, gradients in bf16, or
optimizer states in host memory.

Each shard is updated block by block in fp32 (parallel/block_update.py). Muon updates matrices before that
(parallel/whole_matrices.py).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from conf.schema import OptimConfig
from parallel.block_update import Block, UpdateBlock, in_torch, random_bits, round_to_bf16, rounding_seed
from parallel.chunked_ops import rows_at_once
from parallel.megatron_compat import optimizer_range, parameters_in_norm, replace_inner_optimizer
from parallel.optimizers import OPTIMIZERS
from parallel.process_groups import Groups
from parallel.sharding import logical_name, sharding_of
from parallel.whole_matrices import WholeMatrices

GPU_BLOCK = 2**22
"""Elements of a block on a GPU: large enough to hide the launches behind the copies, with 0.2 GB of temporaries."""


def is_needed(optim: OptimConfig) -> bool:
    """Whether the settings require BlockAdamW instead of torch's fused AdamW."""
    return optim.name != "adamw" or optim.grad_dtype != "fp32" or optim.state_dtype != "fp32" or optim.cpu_offload


def describe(optim: OptimConfig) -> tuple[str, str]:
    """(optimizer, reason) for the start table."""
    parts = [f"{what} in bf16" for what in ("grad", "state") if getattr(optim, f"{what}_dtype") == "bf16"]
    words = [part.replace("grad", "gradients").replace("state", "moments") for part in parts]
    words += ["states in host memory"] if optim.cpu_offload else []
    name = {"adamw": "BlockAdamW", "muon": "muon, and AdamW"}.get(optim.name, optim.name)
    return name, ": ".join(filter(None, ["configured", ", ".join(words)]))


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's shard of one parameter in the distributed optimizer."""

    start: int
    end: int
    """Range in the flattened parameter."""
    master: nn.Parameter
    """Master weights, fp32 [end - start]; the key of the optimizer's state. A view of the parameter if that is fp32."""
    inner: torch.optim.Optimizer


def optimizer_shards(optimizer: Any) -> dict[nn.Parameter, OptimizerShard]:
    """This rank's shards in one of Megatron-Core's distributed optimizers, by model parameter."""
    if optimizer.is_stub_optimizer:
        return {}
    # Not optimizer.model_param_group_index_map: it is wrong for a group that mixes bf16 and fp32 parameters.
    models = [*optimizer.model_float16_groups, *optimizer.model_fp32_groups]
    masters = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
    found = {}
    for parameter, master in zip(chain(*models), chain(*masters), strict=True):
        found[parameter] = OptimizerShard(*optimizer_range(optimizer, parameter), master, optimizer.optimizer)
    return found


@dataclass(frozen=True)
class _Target:
    """The tensors and the position that belong to a shard of master weights."""

    gradient: Tensor
    """[n], a view of the gradient bucket."""
    weight: Tensor | None
    """bf16 [n], a view of the model parameter; None if the master weights are that view."""
    name: str
    """Of the logical parameter."""
    start: int
    """Index in the flattened parameter of this rank where the shard begins."""
    index_steps: Sequence[tuple[int, int, int]] = ()
    """Sharding.index_steps."""
    state: tuple[str, ...] | None = None
    """What is kept of a matrix that Muon updates; None: Optimizer.state."""


class BlockAdamW(torch.optim.Optimizer):
    """Reads gradients from Megatron-Core's buckets and writes both the master weights and the model weights. Each
    parameter group counts its updates in `step`."""

    grad_scale = 1.0
    """Factor that the gradients are multiplied by, in fp32."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        targets: dict[Tensor, _Target],
        optim: OptimConfig,
        streams: "_Streams",
        update: UpdateBlock | None = None,
    ):
        super().__init__([{"params": []}], {})
        self.param_groups = groups  # the constructor rejects fp32 masters, which are views of parameters
        self._targets, self._streams = targets, streams
        self._optimizer = OPTIMIZERS[optim.name]
        self._update_block, self._whole = update or in_torch(self._optimizer), update is not None
        self._dtype = torch.bfloat16 if optim.state_dtype == "bf16" else torch.float32
        self._offload, self._momentum = optim.cpu_offload, optim.muon_momentum
        self._group_of = {master: group for group in groups for master in group["params"]}
        if self._offload:
            for master, target in targets.items():
                if target.weight is not None:
                    master.data = self._stored(master.data, target)

    def gradients(self, masters: list[Tensor]) -> list[Tensor]:
        """The gradients of master shards, fp32 or bf16: views of the gradient buckets."""
        return [self._targets[master].gradient for master in masters]

    def set_moments(self, master: Tensor, moments: dict[str, Tensor]) -> None:
        """Sets the moments [n] of a shard from tensors of any dtype, rounded to nearest if moments are kept in bf16."""
        target = self._targets[master]
        names = target.state or self._optimizer.state
        self.state[master] = {name: self._stored(moments[name].to(self._dtype), target) for name in names}

    def _ensure_state(self, master: Tensor) -> None:
        if not self.state[master]:
            names = self._targets[master].state or self._optimizer.state
            self.set_moments(master, dict.fromkeys(names, torch.zeros(()).expand(master.shape)))

    def _stored(self, tensor: Tensor, target: _Target) -> Tensor:
        """A copy on the device that keeps the states."""
        here = target.gradient.device
        device, pinned = (torch.device("cpu"), here.type == "cuda") if self._offload else (here, False)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned).copy_(tensor)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        self._streams.begin()
        for group in self.param_groups:
            for master in group["params"]:
                target = self._targets[master]
                if target.state is not None:  # updated already
                    continue
                device = target.gradient.device
                self._ensure_state(master)
                size = GPU_BLOCK if device.type != "cpu" else rows_at_once(1, device)
                if self._whole and not self._offload:  # nothing temporary
                    size = max(1, len(master))
                for start in range(0, len(master), size):
                    with self._streams.next():
                        self._update(group, master, target, slice(start, min(start + size, len(master))))
        self._streams.join()

    def _update(self, group: dict[str, Any], master: Tensor, target: _Target, at: slice) -> None:
        device = target.gradient.device
        kept = [master.data, *(self.state[master][name] for name in self._optimizer.state)]
        # A tensor that is kept on this device is updated in place.
        weight, *moments = here = [t[at].to(device, non_blocking=True, copy=self._offload) for t in kept]
        state = dict(zip(self._optimizer.state, moments, strict=True))
        self._update_block(self._block(group, target, at, weight, state, group["step"]))
        for tensor, new in zip(kept, here, strict=True):
            if tensor[at].data_ptr() != new.data_ptr():
                tensor[at].copy_(new, non_blocking=True)

    def _block(
        self, group: dict[str, Any], target: _Target, at: slice, weight: Tensor, state: dict[str, Tensor], step: int
    ) -> Block:
        return Block(
            weight,
            target.gradient[at],
            state,
            None if target.weight is None else target.weight[at],
            grad_scale=self.grad_scale,
            seed=rounding_seed(target.name, step) if self._dtype == torch.bfloat16 else 0,
            first=target.start + at.start,
            index_steps=target.index_steps,
            step=step,
            **{name: group[name] for name in ("lr", "weight_decay", "betas", "eps")},
        )

    def add_to_momentum(self, master: Tensor, at: slice) -> Tensor:
        """Adds the gradient g to the momentum M of a part of a matrix's shard, M <- mu M + g, before `step`. Returns
        Nesterov's mu M + g, fp32 [n]."""
        target, group = self._targets[master], self._group_of[master]
        self._ensure_state(master)
        (kept,) = self.state[master].values()
        here = kept[at].to(target.gradient.device, copy=self._offload)
        block = self._block(group, target, at, master.data[at], {}, group.get("step", 0) + 1)
        gradient = block.gradient.float()
        if self.grad_scale != 1.0:
            gradient = gradient * self.grad_scale
        momentum = here.float().mul_(self._momentum).add_(gradient)  # in place, where it is kept in fp32
        if here.dtype == torch.bfloat16:
            here.copy_(round_to_bf16(momentum, random_bits(block)))
        if self._offload:
            kept[at].copy_(here)
        return gradient.add(momentum, alpha=self._momentum)

    def subtract(self, master: Tensor, at: slice, direction: Tensor) -> None:
        """Updates a part of a matrix's shard of the weights w by w <- w - lr (direction [n] + weight_decay w)."""
        target, group = self._targets[master], self._group_of[master]
        weight = master.data[at].to(direction.device, copy=self._offload)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        if target.weight is not None:
            target.weight[at].copy_(weight)
        if self._offload:
            master.data[at].copy_(weight)


class _Streams:
    """Alternates between two CUDA streams, so that one block is copied from the host while the previous one is copied
    back. Without offloading, and on a CPU, everything runs on the current stream. Created once, since the caching
    allocator has a separate pool for every stream."""

    def __init__(self, on: bool):
        self._streams = [torch.cuda.Stream(), torch.cuda.Stream()] if on and torch.cuda.is_available() else []
        self._begun = 0

    def begin(self) -> None:
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())

    def next(self) -> AbstractContextManager[Any]:
        self._begun += 1
        return torch.cuda.stream(self._streams[self._begun % 2]) if self._streams else nullcontext()

    def join(self) -> None:
        """Waits until all copies to the host are complete."""
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)
            stream.synchronize()


def install(
    optimizer: Any,
    optim: OptimConfig,
    modules: list[nn.Module],
    groups: Groups,
    update: UpdateBlock | None = None,
) -> Callable[[], None]:
    """Replaces the AdamW that Megatron-Core's distributed optimizers step with by BlockAdamW.

    Args:
        update: of a block; None: in plain PyTorch.

    Returns:
        What all ranks call together before the distributed optimizer's step: the update of the matrices.
    """
    all_shards: dict[nn.Parameter, OptimizerShard] = {}
    rule = OPTIMIZERS[optim.name]
    names = {p: logical_name(name, p) for module in modules for name, p in module.named_parameters()}
    streams = _Streams(optim.cpu_offload)
    for part in optimizer.chained_optimizers:
        targets: dict[Tensor, _Target] = {}
        for parameter, shard in optimizer_shards(part).items():
            at = slice(shard.start, shard.end)
            weight = parameter.data.view(-1)[at] if parameter.dtype == torch.bfloat16 else None
            gradient = gradient_of(parameter).view(-1)[at]
            steps = sharding_of(parameter).index_steps(parameter.shape)
            kept = rule.state_of(parameter)
            state = None if kept is rule.state else kept
            targets[shard.master] = _Target(gradient, weight, names[parameter], shard.start, steps, state)
        if targets:
            inner = BlockAdamW(part.optimizer.param_groups, targets, optim, streams, update)
            replace_inner_optimizer(part, inner)
            all_shards |= optimizer_shards(part)
    return _matrix_step(optim, modules, groups, all_shards)


def _matrix_step(
    optim: OptimConfig, modules: list[nn.Module], groups: Groups, shards: dict[nn.Parameter, OptimizerShard]
) -> Callable[[], None]:
    rule = OPTIMIZERS[optim.name]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if rule.state_of(p) is not rule.state]
    ranges = {p: (shard.start, shard.end) for p, shard in shards.items()}
    families = []
    for dense, data, tensor in (
        (True, groups.optimizer_dp_cp, groups.tp),
        (False, groups.optimizer_edp, groups.etp),
    ):
        mine = [p for p in matrices if getattr(p, "allreduce", True) == dense]
        families.append(WholeMatrices(mine, ranges, data, tensor, split_heads=optim.muon_split_qkv))

    def momentum(parameter: nn.Parameter, start: int, end: int) -> Tensor:
        shard = shards[parameter]
        return cast("BlockAdamW", shard.inner).add_to_momentum(
            shard.master, slice(start - shard.start, end - shard.start)
        )

    def apply(parameter: nn.Parameter, start: int, end: int, direction: Tensor) -> None:
        shard = shards[parameter]
        cast("BlockAdamW", shard.inner).subtract(shard.master, slice(start - shard.start, end - shard.start), direction)

    def step() -> None:
        for family in families:
            family.step(momentum, apply)

    return step


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """What the gradients of a step are added up in: a view of a bucket of Megatron-Core's."""
    return parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]


def gradients_for_norm(part: Any) -> list[Tensor]:
    """The gradients of one of the distributed optimizers that count in the gradient norm on this rank."""
    counted = parameters_in_norm(part)
    return part.optimizer.gradients(counted) if counted else []
