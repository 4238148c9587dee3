"""A tiny model under any layout, its training data, and its logical tensors gathered from all ranks, for the parity
matrix and the tests of parallel/."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.lora_layers import is_adapter
from conf.schema import (
    Config,
    Fp8Config,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    PreferenceConfig,
)
from parallel import optimizer_state
from parallel.distributed_optimizer import NO_OVERLAP, Overlap
from parallel.engine import Batch, Engine
from parallel.env import World
from parallel.layout import Layout
from parallel.optimizer_state import OptimizerShard
from parallel.process_groups import Runtime
from parallel.sharding import logical_name

SEQUENCE, VOCABULARY, MICRO_BATCH, MICRO_BATCHES = 16, 64, 2, 4

# One sequence ends before its middle, so that a rank may hold only padding of it.
PADDING_BS = torch.stack([torch.arange(SEQUENCE) >= 6, torch.zeros(SEQUENCE, dtype=torch.bool)])

# Adam divides by the square root of the second moment: with the usual eps, a gradient that is zero up to rounding would
# change a weight by the whole learning rate, and layouts would differ for this reason alone.
OPTIM = OptimConfig(lr=1e-2, eps=1e-3)


@dataclass(frozen=True)
class Variant:
    """The features of a model in a cell of the matrix."""

    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    document_mask: bool = False
    begin_alike: bool = False
    """All documents begin with the same token, so that under document_mask the first tokens have equal gates."""
    packed: bool = False
    """Sequences as of packed conversations: padding at the end, and weights of the labels that are 0, 1 or less."""
    dtype: torch.dtype = torch.float32
    seed: int = 1
    optim: dict[str, Any] = field(default_factory=dict)
    """Settings of the optimizer other than OPTIM's."""
    objective: str = "language_modeling"
    preference: dict[str, Any] = field(default_factory=dict)
    replay: bool = False
    """Router replay: the batches have a routing, which no router would choose."""
    gemm: Any = None
    """ops.gemm_backend.GemmBackend for the products of every layer."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Settings of low-rank adapters."""
    fuse_weight_gradient: bool = False
    """As ops.weight_gradient."""
    transformer_engine: bool = False
    """Whether TransformerEngine computes what it can, for which it has to be importable."""
    cp_comm_type: str = "all_gather"
    """parallel.cp_comm_type, of which others than all_gather are TransformerEngine's."""
    fp8: dict[str, Any] = field(default_factory=dict)
    """Settings of fp8 other than kernels=te, for products in FP8 by TransformerEngine; empty: there are none."""

    def config(self) -> ModelConfig:
        moe = MoeConfig(**{"num_experts": 4, "top_k": 2, "capacity_factor": 1.0, **self.moe})
        sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
        sizes |= {"ffn_hidden_size": 48, "vocab_size": VOCABULARY}
        return ModelConfig(**{**sizes, **self.model}, moe=moe)


@contextmanager
def started(
    world: World, parallel: ParallelConfig, backend: str | None = None, *, amax: bool = False
) -> Iterator[Runtime]:
    """Initialises the process groups of this rank, without Megatron-Core's warnings; the last two arguments are those
    of process_groups.start."""
    from parallel import process_groups

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            layout = Layout.of(parallel, world.size)
            yield process_groups.start(world, layout, seed=1, timeout=60, threads=1, backend=backend, amax=amax)
        finally:
            process_groups.stop()
            logging.disable(logging.NOTSET)


def build_engine(
    runtime: Runtime,
    variant: Variant,
    optim: OptimConfig | None = OPTIM,
    overlap: Overlap = NO_OVERLAP,
    adam: type[torch.optim.Optimizer] = torch.optim.AdamW,
    b_std: float = 0.1,
) -> Engine:
    """b_std: standard deviation of what is 0 at first in a run: the adapters' B and DoRA's changes of lengths."""
    from models.decoder import ModelBuildContext, ModelChunk
    from models.init import initialise
    from models.megatron_config import transformer_config
    from models.objectives import objective_of
    from ops.experts import ExpertBackend
    from ops.fp8 import Float8
    from ops.implementations import Ops

    model = variant.config()
    fuse = variant.fuse_weight_gradient
    core = transformer_config(model, runtime, variant.dtype, deterministic=False, fuse_weight_gradient=fuse)
    by_te = te_ops(runtime, variant) if variant.transformer_engine else {}
    gemm, float8 = variant.gemm, None
    if gemm:
        float8 = Float8(ExpertBackend.on(gemm), gemm, range(model.num_layers))
    lora = LoraConfig(**variant.lora)
    context = ModelBuildContext(model, core, runtime, variant.seed, Ops(float8=float8, **by_te), lora)

    def build_chunk(chunk: int) -> ModelChunk:
        made = ModelChunk(context, chunk=chunk, sequence_length=SEQUENCE, document_mask=variant.document_mask)
        if lora.rank is not None:
            for name, parameter in made.named_parameters():
                if name.endswith((".b", ".m")) and is_adapter(name):
                    parameter.sharding = dataclasses.replace(parameter.sharding, std=b_std)
            initialise(made, variant.seed)
        return made

    objective = objective_of(variant.objective, PreferenceConfig(**variant.preference))
    only_adapters = is_adapter if lora.rank is not None else None
    return Engine(core, runtime, optim, build_chunk, overlap, adam, objective=objective, trained=only_adapters)


def te_ops(runtime: Runtime, variant: Variant) -> dict[str, Any]:
    """TransformerEngine's implementation of every operation that has one, without a trial, by the operation's field."""
    from models.operations import OPERATIONS
    from ops import te
    from ops.run_context import RunContext

    parallel = ParallelConfig(cp_comm_type=variant.cp_comm_type)
    config = Config(model=variant.config(), lora=LoraConfig(**variant.lora), parallel=parallel)
    if variant.fp8:
        config.precision, config.fp8 = "fp8", Fp8Config(kernels="te", **variant.fp8)
    context = RunContext(config, runtime, variant.dtype)
    return {
        operation.field: implementation.loaded(context)
        for operation in OPERATIONS
        for implementation in operation.implementations
        if implementation.name in (te.NAME, "te", variant.cp_comm_type)
        and operation.is_used(context)
        and implementation.unsupported_reason(context) is None
    }


def micro_batch(key: int, sequences: int = MICRO_BATCH) -> Batch:
    """Random tokens in two documents a sequence, some masked out of the loss."""
    text = torch.randint(0, VOCABULARY, (sequences, SEQUENCE + 1), generator=torch.Generator().manual_seed(key))
    positions = torch.cat([torch.arange(5), torch.arange(SEQUENCE - 5)]).expand(sequences, -1)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "positions": positions,
        "loss_mask": (text[:, 1:] % 3 != 0).float(),
    }


def routing(key: int, model: ModelConfig, sequences: int = MICRO_BATCH) -> Tensor:
    """Random experts [B, S, L, K] of a micro-batch, different ones for a token."""
    generator = torch.Generator().manual_seed(key)
    layers, moe = len(model.sparse_layers), model.moe
    return torch.rand(sequences, SEQUENCE, layers, moe.num_experts, generator=generator).argsort(-1)[..., : moe.top_k]


def preference_batch(key: int, sequences: int = MICRO_BATCH) -> Batch:
    """Two responses to each prompt of three random tokens, of different lengths."""
    batch, at = micro_batch(key, sequences), torch.arange(SEQUENCE)
    length_B = torch.tensor([6 + (7 * key + 5 * i) % (SEQUENCE - 5) for i in range(sequences)])[:, None]
    tokens = batch["tokens"].clone()
    tokens[1::2, :3] = tokens[::2, :3]
    noise = torch.randn(sequences, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    return {
        "tokens": tokens.where(at < length_B, 0),
        "labels": tokens.roll(-1, 1).where(at < length_B - 1, 0),
        "positions": at.expand(sequences, -1),
        "loss_mask": ((at >= 2) & (at < length_B - 1)).float(),
        "padding": at >= length_B,
        "reference_logps": -4.2 * (length_B[:, 0] - 3) + noise,
    }


def packed(batch: Batch) -> Batch:
    """The micro-batch as one of packed conversations: the padding is a document of its own."""
    mask_BS = batch["loss_mask"].masked_fill(PADDING_BS, 0.0) * torch.where(batch["labels"] % 4 == 1, 0.3, 1.0)
    begins_BS = PADDING_BS.int().argmax(1, keepdim=True)
    positions_BS = torch.where(PADDING_BS, torch.arange(SEQUENCE) - begins_BS, batch["positions"])
    return batch | {"loss_mask": mask_BS, "padding": PADDING_BS, "positions": positions_BS}


def my_batches(
    runtime: Runtime,
    step: int,
    *,
    begin_alike: bool = False,
    as_packed: bool = False,
    replayed: ModelConfig | None = None,
    make: Callable[[int], Batch] = micro_batch,
) -> list[Batch]:
    """This data-parallel rank's share of a step's MICRO_BATCHES micro-batches.

    Args:
        replayed: a model whose routers replay a routing.
    """
    mine = range(runtime.groups.dp.rank(), MICRO_BATCHES, runtime.groups.dp.size())
    batches = [make(100 * step + i) for i in mine]
    if begin_alike:
        batches = [b | {"tokens": b["tokens"].masked_fill(b["positions"] == 0, 7)} for b in batches]
    if replayed:
        batches = [b | {"routing": routing(100 * step + i, replayed)} for i, b in zip(mine, batches, strict=True)]
    return [packed(batch) for batch in batches] if as_packed else batches


def evaluated(engine: Engine, batches: list[Batch]) -> tuple[Any, float]:
    """(sum of the losses of labels, or sums of the objective and its metrics; number of labels, or of prompts)."""
    if engine.objective is None:
        return engine.evaluate([batch | {"padding": PADDING_BS} for batch in batches])
    sums, prompts = engine.evaluate_objective(batches)
    return [*sums.values()], prompts


def gather(engine: Engine, part: Callable[[nn.Parameter, OptimizerShard], Tensor | None]) -> dict[str, Tensor]:
    """Whole logical tensors, put together from all ranks' pieces; copies have to agree.

    Args:
        part: [end - start], the values of this rank's piece of a parameter; None: there are none of this parameter.
    """
    mine = []
    for name, parameter, shard in _optimizer_shards(engine):
        if (values := part(parameter, shard)) is None:
            continue
        local = torch.full((parameter.numel(),), torch.nan)
        local[shard.start : shard.end] = values.detach()
        cuts = [(axis, group.rank(), group.size()) for axis, group in parameter.sharding.sharded_dims]
        shape = parameter.sharding.logical_shape(parameter.shape)
        mine.append((name, shape, cuts, local.view(parameter.shape)))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    wholes: dict[str, Tensor] = {}
    for name, shape, cuts, local in (entry for entries in everyone for entry in entries):
        box = wholes.setdefault(name, torch.full(shape, torch.nan))
        for axis, index, parts in cuts:
            box = box.chunk(parts, dim=axis)[index]
        both = ~box.isnan() & ~local.isnan()
        torch.testing.assert_close(box[both], local[both], rtol=1e-5, atol=1e-8)
        box.copy_(torch.where(local.isnan(), box, local))
    holes = [name for name, whole in wholes.items() if whole.isnan().any()]
    assert not holes, holes
    return wholes


def _optimizer_shards(engine: Engine) -> Iterator[tuple[str, nn.Parameter, OptimizerShard]]:
    shards = optimizer_state._optimizer_shards(engine)
    for module in engine.modules:
        for name, parameter in module.named_parameters():
            if parameter in shards:
                yield logical_name(name, parameter), parameter, shards[parameter]


def gradients(engine: Engine) -> dict[str, Tensor]:
    return gather(engine, lambda parameter, shard: parameter.main_grad.flatten()[shard.start : shard.end])
