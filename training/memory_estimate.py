"""Estimates the memory of a training run from its configuration."""

from collections import Counter
from dataclasses import dataclass

from conf.extensions import input_projections, kept_tensors
from conf.fp8_rules import FP8_BLOCK, fp8_layers
from conf.schema import Config, ModelConfig
from parallel.layout import Layout
from training.adapters import adapter_parameters
from training.flops import attention_matrices, attention_vectors
from training.frozen import frozen_parameters
from training.kept_activations import Activations


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the rank that needs most. Memory of the libraries themselves, fragmentation and uneven expert
    load are not included."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    fp8_weights: float = 0.0
    """The quantized weights of the FP8 layers, for the forward and the backward products."""
    host: float = 0.0
    """Optimizer states in host memory, on a GPU with optim.cpu_offload; not part of the total."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.fp8_weights


def memory_per_rank(config: Config, layout: Layout, *, bf16: bool, on_gpu: bool | None = None) -> Memory:
    """The memory of a rank in the pipeline stage that needs most. A parameter has a weight, a gradient and, sharded
    over the data-parallel ranks, what the optimizer keeps (AdamW: two moments); with bf16 also an fp32 master weight.

    Args:
        on_gpu: None: as config.cluster says.
    """
    on_gpu = config.cluster.gpus if on_gpu is None else on_gpu
    stages = stages_of(config.model, layout)
    return max((stage_memory(config, layout, s, bf16=bf16, on_gpu=on_gpu) for s in stages), key=lambda m: m.total)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage, as far as memory and time depend on it."""

    index: int
    sparse: int
    """Number of sparse layers."""
    dense: int
    is_first: bool
    is_last: bool
    alike: int = 1
    """Number of stages that are alike, this one included."""


def stages_of(model: ModelConfig, layout: Layout) -> list[Stage]:
    """The first of all stages that are alike in their layers: of those it keeps most activations."""
    kinds = [(*stage_layers(model, layout, i), i == 0, i == layout.pp - 1) for i in range(layout.pp)]
    return [Stage(kinds.index(kind), *kind, alike=n) for kind, n in Counter(kinds).items()]


Matrix = tuple[float, float, float]
"""(number of matrices, inner dimension of the forward product, outer dimension)."""


def stage_memory(
    config: Config, layout: Layout, stage: Stage, *, bf16: bool, on_gpu: bool, imbalance: float = 1.0
) -> Memory:
    """The memory of a rank of a pipeline stage.

    Args:
        imbalance: rows of its experts relative to the mean.
    """
    model, train = config.model, config.train
    value = 2 if bf16 else 4
    spread, experts = stage_parameters(model, layout, stage)
    frozen = frozen_parameters(config)
    trained_spread, trained_experts = spread * frozen.dense_share, experts * frozen.expert_share
    adapters = sum(adapter_parameters(config, layout, stage))
    gradient = 2 if bf16 and config.optim.grad_dtype == "bf16" else 4
    optimizer = optimizer_bytes(config, layout, stage, bf16=bf16)
    offload = on_gpu and config.optim.cpu_offload
    micro_batches = train.global_batch_size // (train.micro_batch_size * layout.dp)
    in_flight = micro_batches_in_flight(layout, stage.index, micro_batches)
    kept = Activations(config, layout, bf16, on_gpu, imbalance)
    layers = stage.sparse * kept.layer(sparse=True) + stage.dense * kept.layer(sparse=False) + kept.shared()
    layers -= kept.before_adapters() if stage.is_first else 0.0
    beyond = kept.beyond(sparse=stage.sparse, dense=stage.dense, is_last=stage.is_last)
    return Memory(
        weights=value * (spread + experts + adapters),
        gradients=float(gradient * (trained_spread + trained_experts + adapters)),
        optimizer=0.0 if offload else optimizer,
        activations=in_flight * layers + beyond + kept.gathered(),
        fp8_weights=_fp8_weights(config, layout, stage.index) if config.precision == "fp8" else 0.0,
        host=optimizer if offload else 0.0,
    )


def optimizer_bytes(config: Config, layout: Layout, stage: Stage, *, bf16: bool) -> float:
    """Master weights and optimizer states of a rank of a pipeline stage."""
    optim, frozen = config.optim, frozen_parameters(config)
    each, master = 2 if optim.state_dtype == "bf16" else 4, 4 if bf16 else 0
    of_matrices, of_others = (each * kept_tensors(optim.name, of_matrices=which) for which in (True, False))
    counts = stage_parameters(config.model, layout, stage)
    shares = (frozen.dense_share, frozen.matrix_share), (frozen.expert_share, frozen.expert_share)
    replicas = layout.optimizer_ranks
    adapters = adapter_parameters(config, layout, stage)
    total = sum((master + of_others) * count / copies for count, copies in zip(adapters, replicas, strict=True))
    families = matrices(config.model, layout, stage.sparse, stage.dense)
    for count, (share, matrix_share), family, copies in zip(counts, shares, families, replicas, strict=True):
        in_matrices = matrix_share * sum(n * inner * outer for n, inner, outer in family)
        total += ((master + of_others) * share * count + (of_matrices - of_others) * in_matrices) / copies
    return total


def micro_batches_in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """The largest number of micro-batches whose activations a stage keeps: with 1F1B pp - stage of them (Narayanan et
    al. 2021, arXiv:2104.04473, section 2.2); interleaved, (2 (pp - 1 - stage) + (vpp - 1) pp + 1) / vpp, counted in
    chunks of 1 / vpp of the stage's layers (Megatron-Core's schedule)."""
    chunks = 2 * (layout.pp - 1 - stage) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches, layout.pp - stage if layout.vpp == 1 else chunks / layout.vpp)


def _fp8_weights(config: Config, layout: Layout, stage: int) -> float:
    """Bytes of quantized weights that are cached between optimizer steps (ops.grouped_mlp.kept_weight)."""
    model, fp8 = config.model, config.fp8
    layers = fp8_layers(fp8.first_layers_high, fp8.last_layers_high, model.num_layers)
    linear, experts = matrices(
        model, layout, *stage_layers(model, layout, stage, within=layers), replicated=fp8.kernels == "te"
    )
    quantized = [*linear, *experts] if fp8.linear_layers else experts
    values = sum(n * inner * outer for n, inner, outer in quantized)
    if fp8.kernels == "reference" or (fp8.kernels == "auto" and not config.cluster.gpus):
        # Emulated in bf16; one copy serves both directions if they are quantized alike.
        return 2 * values * (2 if fp8.recipe == "rowwise" else 1)
    scales = {
        "blockwise": values / FP8_BLOCK**2,
        "rowwise": sum(n * (inner + outer) for n, inner, outer in quantized),
        "tensorwise": 0,
        "delayed": 0,
        "mxfp8": 2 * values / 32 / 4,
    }
    # One byte in each of two layouts, since FP8 products read both operands along the inner dimension; fp32 scales.
    return 2 * values + 4 * scales[fp8.recipe]


def stage_layers(model: ModelConfig, layout: Layout, stage: int, within: range | None = None) -> tuple[int, int]:
    """Numbers of sparse and dense layers of a pipeline stage, those for multi-token prediction included.

    Args:
        within: count only these layers; None: all.
    """
    chunks = range(stage, layout.pp * layout.vpp, layout.pp)
    layers = [layer for chunk in chunks for layer in layout.chunk_layers(chunk, model.num_layers)]
    layers += model.mtp_layers if stage == layout.pp - 1 else ()
    layers = layers if within is None else [layer for layer in layers if layer in within]
    sparse = sum(map(model.is_sparse, layers))
    return sparse, len(layers) - sparse


def stage_parameters(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[float, float]:
    """Numbers of parameters of one rank: (outside experts, of experts)."""
    d, moe, sparse, dense = model.hidden_size, model.moe, stage.sparse, stage.dense
    spread, experts = (sum(n * k * m for n, k, m in part) for part in matrices(model, layout, sparse, dense))
    tables = 1 if model.ties_head and layout.pp == 1 else stage.is_first + stage.is_last
    further = model.mtp_num_layers if stage.is_last else 0
    if further and layout.pp > 1 and not model.ties_head:
        tables += 1  # a copy of the embedding
    cut_vectors, copied_vectors = attention_vectors(model)
    spread += (sparse + dense) * cut_vectors / layout.tp
    if model.ffn_bias:
        shared = sparse if moe.num_shared_experts else 0
        gates = input_projections(model.activation) / layout.tp
        spread += dense * (gates * model.ffn_hidden_size + d) + shared * (gates * model.shared_width + d)
    norm = 2 * d if model.norm == "layernorm" else d
    head_bias = model.vocab_size if model.head_bias and not model.reward_head else 0
    copied = (sparse + dense) * (2 * norm + copied_vectors) + sparse * (d + moe.router_bias) * moe.num_experts
    copied += stage.is_last * (norm + head_bias / layout.tp) + further * (2 * d * d + 3 * norm)
    biases = input_projections(model.activation) * model.expert_width + d if moe.expert_bias else 0
    experts += sparse * moe.num_experts * biases / (layout.ep * layout.etp)
    if model.reward_head:
        tables, copied = stage.is_first, copied + stage.is_last * d
    return spread + tables * model.vocab_size * d / layout.tp + copied, experts


def matrices(
    model: ModelConfig, layout: Layout, sparse: int, dense: int, *, replicated: bool = True
) -> tuple[list[Matrix], list[Matrix]]:
    """One rank's weight matrices: (of linear layers in attention and feed-forward layers, of experts).

    Args:
        replicated: with those of latent attention that are, which our own FP8 kernels do not quantize.
    """
    d, f, moe, layers = model.hidden_size, model.ffn_hidden_size, model.moe, sparse + dense
    gates = input_projections(model.activation)
    linear = [
        (layers, inner / (layout.tp if sharded == "inner" else 1), outer / (layout.tp if sharded == "outer" else 1))
        for inner, outer, sharded in attention_matrices(model)
        if sharded or replicated
    ]
    for count, width in ((dense, f / layout.tp), (sparse, model.shared_width / layout.tp)):
        linear += [(gates * count, d, width), (count, width, d)]
    count, width = sparse * moe.num_experts / layout.ep, model.expert_width / layout.etp
    return linear, [(count, d, gates * width), (count, width, d)]
