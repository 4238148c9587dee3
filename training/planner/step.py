"""Predicts the memory and the time of a training step under a layout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from conf.schema import Config
from parallel.layout import Layout
from training.adapters import run_cost
from training.flops import Cost
from training.memory_estimate import Memory, Stage, optimizer_bytes, stage_memory, stage_parameters, stages_of
from training.planner.bubble import bubble, by_schedule
from training.planner.links import Links
from training.planner.muon import muon_seconds
from training.planner.rates import Rates
from training.planner.work import Parts, stage_times

OVERLAPPED = 0.8
"""Share of a micro-batch's time behind which the data-parallel collectives of a stage can hide."""
HOST_LINK = 50e9
"""Bytes per second between a GPU and its host, for offloaded optimizer states (PCIe 5.0)."""
GPU_OVERHEAD = 1.5e9
"""Bytes of CUDA's context, of NCCL's buffers and of cuBLAS's workspaces, without the allocator's fragmentation."""


@dataclass(frozen=True)
class Prediction:
    """One layout's step."""

    layout: Layout
    memory: Memory
    """Of the fullest rank."""
    seconds: float
    parts: Parts
    """Seconds of the slowest stage, by part; their sum is `seconds`."""
    cost: Cost
    tokens: int
    """Of a step."""
    peak: float
    """FLOP/s of a GPU."""
    bubbles: dict[str, float]
    """Seconds of a step that the slowest stage idles, by schedule; empty without a pipeline."""

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.layout.world

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s, without recomputation."""
        return self.cost.flops_per_token * self.tokens_per_second_per_gpu

    @property
    def mfu(self) -> float:
        return self.flops_per_gpu / self.peak

    @property
    def memory_bytes(self) -> float:
        """Peak of the fullest rank, with what libraries take."""
        return self.memory.total + GPU_OVERHEAD


def predict(
    config: Config,
    layout: Layout,
    rates: Rates,
    *,
    imbalance: float = 1.0,
    host: bool = True,
    fused: bool = False,
    stages: Sequence[Stage] | None = None,
) -> Prediction:
    """Predicts a valid configuration (conf/rules.py).

    Args:
        imbalance: rows of the experts of the rank that has most, relative to the mean.
        host: False: launches cost nothing, as with CUDA graphs.
        fused: as for training.planner.work.stage_times.
        stages: as for memory_of.
    """
    train = config.train
    links = Links(layout, config.cluster)
    micro_batches = train.global_batch_size // (train.micro_batch_size * layout.dp)
    stages = stages or stages_of(config.model, layout)
    times = [stage_times(config, layout, stage, rates, links, imbalance, fused=fused) for stage in stages]
    totals = [t.total if host else t.forward.total() + t.backward.total() for t in times]
    every = [total for total, stage in zip(totals, stages, strict=True) for _ in range(stage.alike)]
    slowest = times[totals.index(max(totals))]
    parts: Parts = Counter()
    for part in (slowest.forward, slowest.backward):
        for name, seconds in part.items():
            parts[name] += seconds * micro_batches
    computing = slowest.forward.total() + slowest.backward.total()
    waiting = max(0.0, slowest.host - computing) if host else 0.0
    parts["launches"] = waiting * micro_batches
    parts["pipeline bubble"] = bubble(every, layout.vpp)
    parts["pipeline exchange"] = _exchange(config, layout, links, micro_batches)
    parts["data parallel"] = _data_parallel(
        config, layout, stages, links, slowest.forward.total(), slowest.backward.total()
    )
    parts["optimizer"] = _optimizer(config, layout, stages, rates, links)
    parts = Counter({name: seconds for name, seconds in parts.items() if seconds})
    memory = memory_of(config, layout, imbalance, stages)
    tokens = train.global_batch_size * train.sequence_length
    bubbles = by_schedule(every, config.model.num_layers)
    return Prediction(layout, memory, parts.total(), parts, run_cost(config), tokens, rates.peak, bubbles)


def memory_of(config: Config, layout: Layout, imbalance: float = 1.0, stages: Sequence[Stage] | None = None) -> Memory:
    """The memory of the fullest rank, on GPUs in bf16 or FP8.

    Args:
        stages: of training.memory_estimate.stages_of, where they are known.
    """
    stages = stages or stages_of(config.model, layout)
    each = (stage_memory(config, layout, s, bf16=True, on_gpu=True, imbalance=imbalance) for s in stages)
    return max(each, key=lambda memory: memory.total)


def _exchange(config: Config, layout: Layout, links: Links, micro_batches: int) -> float:
    """Activations and their gradients between stages; the steady state waits for each of them."""
    if layout.pp == 1:
        return 0.0
    train, width = config.train, config.model.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    size = 2 * train.micro_batch_size * train.sequence_length / layout.cp * width
    return 2 * micro_batches * layout.vpp * links.between_stages(size)


def _data_parallel(
    config: Config, layout: Layout, stages: Sequence[Stage], links: Links, forward: float, backward: float
) -> float:
    """What backward passes do not hide of reducing gradients, and forward passes of gathering parameters.

    A chunk gathers its parameters behind its first forward pass. It reduces its gradients behind its last backward pass
    and, interleaved, behind those of the chunks before it: pp micro-batches go through each of them meanwhile. So all
    reductions share the time from the last chunk's last backward pass on; the first chunk's has only its own pass."""
    kept = 2 if config.optim.grad_dtype == "bf16" else 4
    chunks = layout.vpp
    last_passes = (1 + (chunks - 1) * layout.pp) / chunks
    longest = 0.0
    for stage in stages:
        spread, experts = stage_parameters(config.model, layout, stage)
        reduced = links.ring("dp_cp", kept * spread) + links.ring("edp", kept * experts)
        gathered = links.ring("dp_cp", 2 * spread) + links.ring("edp", 2 * experts)
        dense_ranks, expert_ranks = layout.optimizer_ranks
        reduced += 2 * links.ring("instances", kept * (spread / dense_ranks + experts / expert_ranks))
        of_first_chunk = (reduced - OVERLAPPED * backward) / chunks
        exposed = max(0.0, of_first_chunk, reduced - OVERLAPPED * last_passes * backward)
        longest = max(longest, exposed + max(0.0, gathered - OVERLAPPED * forward))
    return longest


def _optimizer(config: Config, layout: Layout, stages: Sequence[Stage], rates: Rates, links: Links) -> float:
    """AdamW or Muon, the gradient norm, clipping, the copy to bf16 and clearing the gradients."""
    counts = [stage_parameters(config.model, layout, stage) for stage in stages]
    dense_ranks, expert_ranks = layout.optimizer_ranks
    sharded = max(spread / dense_ranks + experts / expert_ranks for spread, experts in counts)
    whole = max(map(sum, counts))
    optim = config.optim
    narrow = optim.grad_dtype == "bf16" or optim.state_dtype == "bf16"
    per_billion = rates.curves["adamw_ms_per_billion"] / 1e3 * 4302e9 / rates.memory
    seconds = per_billion * sharded / 1e9
    if optim.cpu_offload:
        moved = max(optimizer_bytes(config, layout, stage, bf16=True) for stage in stages)
        seconds = max(seconds, moved / HOST_LINK)
    if optim.name == "muon":
        seconds += max(muon_seconds(config, layout, stage, rates, links) for stage in stages)
    others = (4 if narrow else 15) * sharded + (2 if optim.grad_dtype == "bf16" else 4) * whole
    return seconds + others / rates.memory
