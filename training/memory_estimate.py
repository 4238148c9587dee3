"""Estimates the memory of a training run from its configuration."""

from dataclasses import dataclass

from conf.extensions import input_projections, kept_tensors
from conf.fp8_rules import FP8_BLOCK, fp8_layers
from conf.schema import Config, ModelConfig
from parallel.layout import Layout
from training.flops import attention_matrices, attention_vectors, experts_per_token
from training.frozen import frozen_parameters


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


def stages_of(model: ModelConfig, layout: Layout) -> list[Stage]:
    """The first of all stages that are alike in their layers: of those it keeps most activations."""
    first: dict[tuple[int, int, bool, bool], Stage] = {}
    for index in range(layout.pp):
        kind = *stage_layers(model, layout, index), index == 0, index == layout.pp - 1
        first.setdefault(kind, Stage(index, *kind))
    return list(first.values())


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
    gradient = 2 if bf16 and config.optim.grad_dtype == "bf16" else 4
    optimizer = optimizer_bytes(config, layout, stage, bf16=bf16)
    offload = on_gpu and config.optim.cpu_offload
    tokens = train.micro_batch_size * train.sequence_length / layout.cp
    micro_batches = train.global_batch_size // (train.micro_batch_size * layout.dp)
    in_flight = micro_batches_in_flight(layout, stage.index, micro_batches)
    # The input and output of the final norm, and the logits; and the same of each further prediction.
    head = value * (2 * model.hidden_size + model.vocab_size / layout.tp) * (1 + model.mtp_num_layers)
    head += value * model.mtp_num_layers * _kept_by_projection(model, layout)
    kept = _kept_per_token(config, layout, stage.sparse, stage.dense, imbalance)
    return Memory(
        weights=value * (spread + experts),
        gradients=float(gradient * (trained_spread + trained_experts)),
        optimizer=0.0 if offload else optimizer,
        activations=tokens * (in_flight * value * kept + stage.is_last * head),
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
    total = 0.0
    families = matrices(config.model, layout, stage.sparse, stage.dense)
    for count, (share, matrix_share), family, replicas in zip(
        counts, shares, families, (layout.dp * layout.cp, layout.edp), strict=True
    ):
        in_matrices = matrix_share * sum(n * inner * outer for n, inner, outer in family)
        total += ((master + of_others) * share * count + (of_matrices - of_others) * in_matrices) / replicas
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
    linear, experts = matrices(model, layout, *stage_layers(model, layout, stage, within=layers), fp8=True)
    quantized = [*linear, *experts] if fp8.linear_layers else experts
    values = sum(n * inner * outer for n, inner, outer in quantized)
    if fp8.kernels == "reference" or (fp8.kernels == "auto" and not config.cluster.gpus):
        # Emulated in bf16; one copy serves both directions if they are quantized alike.
        return 2 * values * (2 if fp8.recipe == "rowwise" else 1)
    scales = {
        "blockwise": values / FP8_BLOCK**2,
        "rowwise": sum(n * (inner + outer) for n, inner, outer in quantized),
        "tensorwise": 0,
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
    tables = 1 if model.tie_embeddings and layout.pp == 1 else stage.is_first + stage.is_last
    further = model.mtp_num_layers if stage.is_last else 0
    if further and layout.pp > 1 and not model.tie_embeddings:
        tables += 1  # a copy of the embedding
    cut_vectors, copied_vectors = attention_vectors(model)
    spread += (sparse + dense) * cut_vectors / layout.tp
    if model.ffn_bias:
        shared = sparse if moe.num_shared_experts else 0
        gates = input_projections(model.activation) / layout.tp
        spread += dense * (gates * model.ffn_hidden_size + d) + shared * (gates * model.shared_width + d)
    norm = 2 * d if model.norm == "layernorm" else d
    copied = (sparse + dense) * (2 * norm + copied_vectors) + sparse * (d + moe.router_bias) * moe.num_experts
    copied += stage.is_last * (norm + model.head_bias * model.vocab_size / layout.tp) + further * (2 * d * d + 3 * norm)
    biases = input_projections(model.activation) * model.expert_width + d if moe.expert_bias else 0
    experts += sparse * moe.num_experts * biases / (layout.ep * layout.etp)
    return spread + tables * model.vocab_size * d / layout.tp + copied, experts


def matrices(
    model: ModelConfig, layout: Layout, sparse: int, dense: int, *, fp8: bool = False
) -> tuple[list[Matrix], list[Matrix]]:
    """One rank's weight matrices: (of linear layers in attention and feed-forward layers, of experts).

    Args:
        fp8: only those that FP8 layers quantize, without the replicated ones of latent attention.
    """
    d, f, moe, layers = model.hidden_size, model.ffn_hidden_size, model.moe, sparse + dense
    gates = input_projections(model.activation)
    linear = [
        (layers, inner / (layout.tp if sharded == "inner" else 1), outer / (layout.tp if sharded == "outer" else 1))
        for inner, outer, sharded in attention_matrices(model)
        if sharded or not fp8
    ]
    for count, width in ((dense, f / layout.tp), (sparse, model.shared_width / layout.tp)):
        linear += [(gates * count, d, width), (count, width, d)]
    count, width = sparse * moe.num_experts / layout.ep, model.expert_width / layout.etp
    return linear, [(count, d, gates * width), (count, width, d)]


def _kept_per_token(config: Config, layout: Layout, sparse: int, dense: int, imbalance: float) -> float:
    """Values per token that are saved for the backward pass: the inputs of norms and matrix products."""
    model = config.model
    d, f, again = model.hidden_size, model.ffn_hidden_size, model.recompute
    outside = d / layout.tp if layout.sequence_parallel else d
    if "full" in again:
        return (sparse + dense) * outside
    block = outside * (2 if "norm" in again else 4)  # inputs and outputs of two norms
    attention = outside + _kept_by_attention(model, layout)
    gates = input_projections(model.activation)
    hidden = gates if "activation" in again else 2 * gates  # of a gated one: both parts, act, product
    # The ranks of a replica have tokens * top_k rows per layer, not padded.
    rows = experts_per_token(model) * layout.etp / layout.tp * imbalance
    # FP8 experts gather rows while reading, and save only the first product's output.
    expert = model.expert_width / layout.etp
    each = 2 * d + gates * expert if config.precision == "fp8" else 3 * d + hidden * expert
    routed = rows * each + hidden * model.shared_width / layout.tp
    per_sparse = 0 if "moe" in again else outside + routed
    return sparse * (block + attention + per_sparse) + dense * (block + attention + hidden * f / layout.tp)


def _kept_by_projection(model: ModelConfig, layout: Layout) -> float:
    """Values per token that a layer for multi-token prediction saves before its block: the embedding, and both norms'
    outputs."""
    outside = model.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    return outside * (1 if {"norm", "full"} & {*model.recompute} else 3)


def _kept_by_attention(model: ModelConfig, layout: Layout) -> float:
    """Values per token that attention saves, without its input."""
    query, key = model.query_width, model.key_width
    if model.kv_lora_rank is not None:
        # Queries, keys, padded values, the padded output and the values of it; inputs and outputs of the norms.
        latent = 2 * ((model.q_lora_rank or 0) + model.kv_lora_rank) + model.qk_rope_head_dim
        return (4 * query + model.output_width) / layout.tp + latent / (layout.tp if layout.sequence_parallel else 1)
    # Queries and keys after the rotary embedding, the fused projection, which contains the values, and the output
    # (twice with torch's attention).
    kept = 4 * query + 3 * key
    if model.attention_output_gate is not None:  # their projection and sigmoid, and the gated output
        kept += 2 * model.gate_width + query
    if model.qk_norm is not None:  # inputs of its norms
        kept += query + key
    if model.clip_qkv is not None:  # inputs and outputs of clipping
        kept += query + (2 if model.qk_norm else 1) * key
    return kept / layout.tp
