"""What a rank keeps in memory during a micro-batch, counted instead of estimated: the model itself runs forward and
backward on the meta device, as one rank of a world without peers, with the implementations of a GPU or of a CPU and the
run's own activation checkpointing. Nothing is computed, so that a world of thousands takes seconds on a laptop.

`training.memory_estimate` has the same as formulas, which need no PyTorch; tests hold the two together."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from conf.lora_layers import is_adapter
from conf.schema import Config
from models.decoder import Block, ModelBuildContext, ModelChunk
from models.megatron_config import transformer_config
from models.operations import OPERATIONS
from ops import te
from ops.implementations import Ops
from ops.operation import Implementation, Operation
from ops.run_context import RunContext
from parallel import chunked_ops
from parallel.batch_context import TRAIN, BatchContext
from parallel.freezing import freeze
from parallel.layout import Layout
from parallel.local_launcher import fake_rank
from parallel.process_groups import Runtime
from training.live_storages import LiveStorages

LEFT_OUT = ("Apex", te.NAME, "te", "deep_ep")
"""Implementations that call other libraries, which know no meta tensors."""


@dataclass
class MetaStep:
    """Bytes of one micro-batch on a pipeline stage."""

    kept: float = 0.0
    """From the forward to the backward pass, without the output layer."""
    of_layers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of it, what each sparse and each dense layer keeps."""
    peak: float = 0.0
    """Of a forward and backward pass, `kept` included."""
    buffer: float = 0.0
    """Megatron-Core's, into which sequence parallelism gathers. It stays between passes and is in neither of these."""

    def activations(self, in_flight: float) -> float:
        """At the peak of a step.

        Args:
            in_flight: micro-batches that the stage keeps (training.memory_estimate.micro_batches_in_flight).
        """
        return (in_flight - 1) * self.kept + self.peak + self.buffer


def meta_step(config: Config, layout: Layout, stage: int, *, on_gpu: bool, bf16: bool) -> MetaStep:
    """Runs a pipeline stage. With virtual stages, those of the stage one after the other: `kept` is the sum, and the
    peak is that of the one which needs most beyond what it keeps.

    Where adapters alone are trained, the model's own weights have no gradient, as in a run.

    Args:
        bf16: whether weights and activations are in bf16.
    """
    dtype, found, beyond = torch.bfloat16 if bf16 else torch.float32, MetaStep(), 0.0
    # Of the ranks of a sequence the second one keeps most: its queries see neither few keys nor all.
    rank = stage * layout.world // layout.pp + (layout.tp if layout.cp > 1 else 0)
    with fake_rank(layout, rank) as runtime, _without_device(on_gpu) as buffer:
        core = transformer_config(config.model, runtime, dtype, deterministic=False)
        ops = ops_on("cuda" if on_gpu else "cpu", config, runtime, dtype)
        context = ModelBuildContext(config.model, core, runtime, config.train.seed, ops, config.lora)
        how = {"sequence_length": config.train.sequence_length, "document_mask": False}
        for index in range(layout.vpp):
            chunk = ModelChunk(context, chunk=index, **how)
            if config.lora.rank is not None:
                freeze([chunk], lambda name: not is_adapter(name))
            # As in a run: what code does not place lies on the host.
            with torch.device("cpu"), _counts(config, layout):
                kept, peak = _run(chunk, config, layout, on_gpu, found)
            found.kept, beyond = found.kept + kept, max(beyond, peak - kept)
    found.peak, found.buffer = found.kept + beyond, buffer.size
    return found


def _run(chunk: ModelChunk, config: Config, layout: Layout, on_gpu: bool, found: MetaStep) -> tuple[float, float]:
    """(bytes that the layers keep, bytes at the peak) of a pipeline chunk."""
    inputs = _inputs(chunk, config, layout)
    given = [] if chunk.input_tensor is None else [chunk.input_tensor]
    live = LiveStorages([*chunk.parameters(), *chunk.buffers(), *given])
    totals = [0.0]
    for block in chunk.layers.values():
        _record(block, live, found.of_layers["sparse" if block.sparse else "dense"], totals)
    for parameter in chunk.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_accumulate, on_gpu))
    with live:
        out = chunk(*inputs, BatchContext(TRAIN, step=1))
        sent = 0 if chunk.post_process or layout.vpp > 1 else out.nbytes  # given back when it has been sent
        live.peak = live.total()
        out = out.mean() if chunk.post_process else out
        if out.requires_grad:  # a first stage without adapters has nothing to train
            torch.autograd.backward([out], [torch.ones_like(out)])
    received = sum(tensor.nbytes for tensor in given)
    return totals[-1] - sent + received, live.peak + received


def _accumulate(on_gpu: bool, parameter: Tensor) -> None:
    """Megatron-Core's hook adds a gradient to its buffer and lets it go. A CPU brings both to one precision first."""
    if not on_gpu and parameter.grad is not None:
        parameter.grad.float()
    parameter.grad = None


def _inputs(chunk: ModelChunk, config: Config, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and labels; sets the activations that an earlier stage would have sent."""
    train, model, meta = config.train, config.model, torch.device("meta")
    here = train.sequence_length // layout.cp
    tokens_BS = torch.empty((train.micro_batch_size, here), dtype=torch.int64, device=meta)
    positions_BS = torch.arange(train.sequence_length).expand(train.micro_batch_size, -1)
    if not chunk.pre_process:
        shape = here // (layout.tp if layout.sequence_parallel else 1), train.micro_batch_size, model.hidden_size
        dtype = chunk.config.params_dtype
        chunk.set_input_tensor(torch.empty(shape, dtype=dtype, device=meta, requires_grad=True))
    return tokens_BS, positions_BS.to(meta), torch.empty_like(tokens_BS) if chunk.post_process else None


def _record(block: Block, live: LiveStorages, sizes: list[float], totals: list[float]) -> None:
    """Notes what a layer adds to what is alive, and what is alive after it."""
    forward = block.forward

    def recorded(*args: Any) -> Tensor:
        before = live.total()
        out = forward(*args)
        totals.append(live.total())
        sizes.append(totals[-1] - before)
        return out

    block.forward = recorded


def ops_on(device: str, config: Config, runtime: Runtime, dtype: torch.dtype) -> Ops:
    """The implementations that a run on such a device chooses where all of them pass their trials: those with kernels
    in Triton on a GPU, those of PyTorch on a CPU."""
    context = RunContext(config, replace(runtime, device=torch.device(device)), dtype)
    attention = _flash_attention if device == "cuda" else _flash_attention_cpu
    chosen: dict[str, Any] = {"causal_attention": attention}
    for operation in OPERATIONS:
        left = "adamw", "update_block", *chosen
        if operation.field not in left and operation.is_used(context):
            implementation = _chosen(operation, context)
            chosen[operation.field] = implementation.loaded(context)
    return Ops(**chosen)


def _chosen(operation: Operation[Any], context: RunContext) -> Implementation[Any]:
    wanted = operation.wanted(context)
    for candidate in operation.implementations:
        if str(candidate.name) in LEFT_OUT or candidate.mismatch(context):
            continue
        if candidate.name == wanted:
            return candidate
        fits = wanted == "auto" and candidate.is_supported(context) and candidate.is_default(context)
        # FP8 kernels ask what GPU there is; the others, whether they serve the settings.
        if fits and (operation.field == "float8" or candidate.unsupported_reason(context) is None):
            return candidate
    return operation.reference(context)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What scaled_dot_product_attention picks on a GPU; of meta tensors it would pick none of its kernels."""
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]


def _flash_attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)[0]


class _GatherBuffer:
    """In place of megatron.core's GlobalMemoryBuffer."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that it came to."""

    def get_tensor(self, shape: list[int], dtype: torch.dtype, name: str) -> Tensor:
        self.size = max(self.size, math.prod(shape) * dtype.itemsize)
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def _without_device(on_gpu: bool) -> Iterator[_GatherBuffer]:
    """Triton launches nothing; autocast, which has no meta device, stays off; blocks of rows are as large as the
    device's."""
    buffer = _GatherBuffer()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(layers, "get_global_memory_buffer", lambda: buffer))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()))
        if not on_gpu:
            of_all = chunked_ops.CPU_VALUES * torch.get_num_threads()
            stack.enter_context(mock.patch.object(chunked_ops, "GPU_VALUES", of_all))
        with contextlib.suppress(ImportError):
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kind in (JITFunction, InterpretedFunction):
                stack.enter_context(mock.patch.object(kind, "run", lambda *args, **kwargs: None))
        yield buffer


@contextlib.contextmanager
def _counts(config: Config, layout: Layout) -> Iterator[None]:
    """The host reads row counts from the device, and meta tensors have none: experts get as many rows each."""
    train, moe = config.train, config.model.moe
    mine = train.micro_batch_size * train.sequence_length // (layout.cp * layout.tp) * moe.top_k
    ranks, etp, experts = layout.ep, layout.etp, max(1, moe.num_experts // layout.ep)
    parts = 1 if ranks == etp == 1 else moe.overlap_degree

    def shares(rows: int, parts: int) -> list[int]:
        return [rows // parts + (i < rows % parts) for i in range(parts)]

    def tolist(tensor: Tensor) -> list[int]:
        if not tensor.is_meta:
            return original(tensor)
        if len(tensor) == experts:  # of a dispatcher that knows them without asking
            return shares(mine * etp, experts)
        assert len(tensor) == parts * (2 * ranks + etp) + experts
        rows = shares(mine, parts)
        figures = [[shares(n, ranks) for n in rows]] * 2  # sent and received
        figures += [[[n] * etp for n in rows], [shares(n * etp, experts // parts) for n in rows]]
        return [number for figure in figures for part in figure for number in part]

    original = torch.Tensor.tolist
    with mock.patch.object(torch.Tensor, "tolist", tolist):
        yield
