"""What a run would be, before it is one: its table on a login node, and the memory that it should take."""

from dataclasses import asdict, dataclass

from conf.extensions import input_projections
from conf.fp8_rules import FP8_BLOCK
from conf.schema import ClusterConfig, Config, ModelConfig
from parallel.layout import Layout
from training.flops import attention_vectors, experts_per_token, model_cost


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank keeps while it trains. An estimate: what the libraries take for themselves and what
    the allocator loses between blocks is not in it, nor is an uneven load of the experts."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    fp8_weights: float = 0.0
    """The weights of the FP8 layers once more, rounded for products in both directions."""
    host: float = 0.0
    """The optimizer's states in the memory of the host, on a GPU with optim.cpu_offload; not in the total."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.fp8_weights


def memory_per_rank(config: Config, layout: Layout, *, bf16: bool, on_gpu: bool | None = None) -> Memory:
    """Of the pipeline stage that needs most. A parameter has its weight, a gradient and, sharded over the data-parallel
    ranks, Adam's two moments; with bf16 an fp32 master copy as well.

    Args:
        on_gpu: None: as the cluster has it.
    """
    on_gpu = config.cluster.gpus if on_gpu is None else on_gpu
    stages = (_stage_memory(config, layout, stage, bf16=bf16, on_gpu=on_gpu) for stage in range(layout.pp))
    return max(stages, key=lambda m: m.total)


Matrix = tuple[float, float, float]
"""(how many, inner dimension of the forward product, outer dimension)."""


def _stage_memory(config: Config, layout: Layout, stage: int, *, bf16: bool, on_gpu: bool) -> Memory:
    model, train = config.model, config.train
    value = 2 if bf16 else 4
    sparse, dense = _layers_of(model, layout, stage)
    is_last = stage == layout.pp - 1
    spread, experts = _parameters(model, layout, sparse, dense, is_first=stage == 0, is_last=is_last)
    gradient = 2 if bf16 and config.optim.grad_dtype == "bf16" else 4
    states = (4 if bf16 else 0) + (4 if config.optim.state_dtype == "bf16" else 8)
    optimizer = states * (spread / (layout.dp * layout.cp) + experts / layout.edp)
    offload = on_gpu and config.optim.cpu_offload
    tokens = train.micro_batch_size * train.sequence_length / layout.cp
    micro_batches = train.global_batch_size // (train.micro_batch_size * layout.dp)
    # 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): a stage begins as many as there are stages after it;
    # interleaved, a few chunks more.
    in_flight = min(micro_batches, layout.pp - stage)
    if layout.vpp > 1:
        in_flight *= 1 + (layout.pp - 1) / (layout.pp * layout.vpp)
    # The final norm's input and output; the logits as they come.
    head = value * (2 * model.hidden_size + model.vocab_size / layout.tp)
    return Memory(
        weights=value * (spread + experts),
        gradients=float(gradient * (spread + experts)),
        optimizer=0.0 if offload else optimizer,
        activations=tokens * (in_flight * value * _kept_per_token(config, layout, sparse, dense) + is_last * head),
        fp8_weights=_fp8_weights(config, layout, stage) if config.precision == "fp8" else 0.0,
        host=optimizer if offload else 0.0,
    )


def _fp8_weights(config: Config, layout: Layout, stage: int) -> float:
    """Bytes that ops.grouped_mlp.kept_weight keeps from one optimizer step to the next."""
    model, fp8 = config.model, config.fp8
    layers = range(fp8.first_layers_high, model.num_layers - fp8.last_layers_high)
    linear, experts = _matrices(model, layout, *_layers_of(model, layout, stage, within=layers))
    matrices = [*linear, *experts] if fp8.linear_layers else experts
    values = sum(n * inner * outer for n, inner, outer in matrices)
    if fp8.kernels == "reference" or (fp8.kernels == "auto" and not config.cluster.gpus):
        # Emulated: bf16 numbers, which serve both directions where both round alike.
        return 2 * values * (2 if fp8.recipe == "rowwise" else 1)
    scales = {
        "blockwise": values / FP8_BLOCK**2,
        "rowwise": sum(n * (inner + outer) for n, inner, outer in matrices),
        "tensorwise": 0,
    }
    # A byte in each of two layouts, since FP8 products read both operands along the inner dimension; fp32 scales.
    return 2 * values + 4 * scales[fp8.recipe]


def _layers_of(model: ModelConfig, layout: Layout, stage: int, within: range | None = None) -> tuple[int, int]:
    """Sparse and dense layers of a pipeline stage.

    Args:
        within: count only these; None: all.
    """
    chunks = range(stage, layout.pp * layout.vpp, layout.pp)
    layers = [layer for chunk in chunks for layer in layout.chunk_layers(chunk, model.num_layers)]
    layers = layers if within is None else [layer for layer in layers if layer in within]
    sparse = sum(map(model.is_sparse, layers))
    return sparse, len(layers) - sparse


def _parameters(
    model: ModelConfig, layout: Layout, sparse: int, dense: int, *, is_first: bool, is_last: bool
) -> tuple[float, float]:
    """Of one rank: those that are spread over the tensor-parallel ranks or copied, and those of experts."""
    d, moe = model.hidden_size, model.moe
    spread, experts = (sum(n * k * m for n, k, m in part) for part in _matrices(model, layout, sparse, dense))
    tables = 1 if model.tie_embeddings and layout.pp == 1 else is_first + is_last
    cut_vectors, copied_vectors = attention_vectors(model)
    spread += (sparse + dense) * cut_vectors / layout.tp
    copied = (sparse + dense) * (2 * d + copied_vectors) + sparse * d * moe.num_experts + is_last * d
    biases = input_projections(model.activation) * model.expert_width + d if moe.expert_bias else 0
    experts += sparse * moe.num_experts * biases / (layout.ep * layout.etp)
    return spread + tables * model.vocab_size * d / layout.tp + copied, experts


def _matrices(model: ModelConfig, layout: Layout, sparse: int, dense: int) -> tuple[list[Matrix], list[Matrix]]:
    """One rank's weights of the linear layers in attention and feed-forward layers, and of experts."""
    d, f, moe, layers = model.hidden_size, model.ffn_hidden_size, model.moe, sparse + dense
    gates = input_projections(model.activation)
    q, k = model.query_width / layout.tp, model.key_width / layout.tp
    linear = [(layers, d, q + 2 * k), (layers, q, d)]
    for count, width in ((dense, f / layout.tp), (sparse, model.shared_width / layout.tp)):
        linear += [(gates * count, d, width), (count, width, d)]
    count, width = sparse * moe.num_experts / layout.ep, model.expert_width / layout.etp
    return linear, [(count, d, gates * width), (count, width, d)]


def _kept_per_token(config: Config, layout: Layout, sparse: int, dense: int) -> float:
    """Values that are kept for the backward pass: what each norm and each matrix product was given."""
    model = config.model
    d, f, again = model.hidden_size, model.ffn_hidden_size, model.recompute
    outside = d / layout.tp if layout.sequence_parallel else d
    if "full" in again:
        return (sparse + dense) * outside
    block = outside * (2 if "norm" in again else 4)  # inputs and outputs of two norms
    # Queries and keys after their rotation, the projection, of which the values are a part, and the result (twice where
    # torch attends).
    attention = outside + (4 * model.query_width + 3 * model.key_width) / layout.tp
    if model.qk_norm is not None:  # what its norms were given
        attention += (model.query_width + model.key_width) / layout.tp
    if model.clip_qkv is not None:  # what was clipped, and the values that came of it
        attention += (model.query_width + (2 if model.qk_norm else 1) * model.key_width) / layout.tp
    gates = input_projections(model.activation)
    hidden = gates if "activation" in again else 2 * gates  # of a gated one: both parts, act, product
    # The ranks of a replica have tokens * top_k rows per layer, taken as evenly spread and as not padded.
    rows = experts_per_token(model) * layout.etp / layout.tp
    # Experts in FP8 read their rows where the tokens are, and of the hidden width keep the product alone.
    expert = model.expert_width / layout.etp
    each = 2 * d + gates * expert if config.precision == "fp8" else 3 * d + hidden * expert
    routed = rows * each + hidden * model.shared_width / layout.tp
    per_sparse = 0 if "moe" in again else outside + routed
    return sparse * (block + attention + per_sparse) + dense * (block + attention + hidden * f / layout.tp)


def preview(config: Config, layout: Layout, data_tokens: int) -> tuple[list[tuple[str, str, str]], list[str]]:
    """What a run would be: rows (what, choice, why) of a table, and what a person should think about.

    Args:
        data_tokens: tokens to train on.

    Raises:
        ValueError: weights, gradients and optimizer alone do not fit into a rank's memory.
    """
    train, cluster = config.train, config.cluster
    cost = model_cost(config.model, train.sequence_length)
    tokens = train.global_batch_size * train.sequence_length
    micro = train.global_batch_size // (train.micro_batch_size * layout.dp)
    bf16 = config.precision in ("bf16", "fp8") or (config.precision == "auto" and cluster.gpus)
    memory = memory_per_rank(config, layout, bf16=bf16)
    reduced = memory.gradients * (layout.dp * layout.cp > 1)
    rows = [
        ("ranks", f"{layout.world}", layout.describe()),
        ("model", f"{config.model.name}: {cost.total / 1e6:,.1f} M parameters, {cost.active / 1e6:,.1f} M active", ""),
        (
            "batch",
            f"{train.global_batch_size} sequences of {train.sequence_length} tokens",
            f"{tokens:,} tokens: {micro} x {train.micro_batch_size} on each of {layout.dp} data-parallel rank(s)",
        ),
        (
            "steps",
            f"{train.steps}",
            f"{train.steps * tokens / 1e6:,.1f} M tokens, {train.steps * tokens / data_tokens:,.2f} epochs of the data",
        ),
        memory_row(memory, cluster),
    ]
    if reduced:
        rows.append(
            ("gradients", f"{reduced / 1e9:.3g} GB a rank and step to reduce", _reduce_time(reduced, layout, cluster))
        )
    return rows, _memory_verdict(memory, cluster, _savings(config, bf16=bf16))


def memory_row(memory: Memory, cluster: ClusterConfig) -> tuple[str, str, str]:
    """The estimate as a row of the start table."""
    parts = {name.replace("_", " "): size / 1e9 for name, size in asdict(memory).items() if size and name != "host"}
    have = f" of {cluster.memory_gb:g} GB" if cluster.memory_gb else ""
    have += f" ({cluster.name})" if cluster.name else ""
    split = ", ".join(f"{name} {size:.3g}" for name, size in parts.items())
    split += f"; and {memory.host / 1e9:.3g} GB of the host's for the optimizer" if memory.host else ""
    return "memory", f"about {memory.total / 1e9:.3g} GB a rank{have}", f"an estimate: {split}"


def _savings(config: Config, *, bf16: bool) -> str:
    """Settings of the optimizer that would take less memory."""
    optim = config.optim
    unused = {"grad_dtype=bf16": bf16 and optim.grad_dtype == "fp32", "state_dtype=bf16": optim.state_dtype == "fp32"}
    unused["cpu_offload=true"] = config.cluster.gpus and not optim.cpu_offload
    return ", ".join(f"optim.{setting}" for setting, possible in unused.items() if possible)


def _memory_verdict(memory: Memory, cluster: ClusterConfig, savings: str) -> list[str]:
    if not cluster.memory_gb:
        return []
    certain, have = (memory.total - memory.activations) / 1e9, cluster.memory_gb
    if certain > have:
        raise ValueError(
            f"weights, gradients and optimizer take {certain:.3g} GB a rank, more than the {have:g} GB of "
            f"cluster={cluster.name}; raise parallel.tp, parallel.pp or parallel.ep, or take more ranks"
            + (f"; these take less: {savings}" if savings else "")
        )
    if memory.total / 1e9 > 0.9 * have:
        return [
            f"memory is likely to run out: about {memory.total / 1e9:.3g} of {have:g} GB a rank. Lower "
            f"train.micro_batch_size{f', set {savings}' if savings else ''} or spread the model further"
        ]
    return []


def _reduce_time(reduced: float, layout: Layout, cluster: ClusterConfig) -> str:
    """A ring moves 2 (n - 1) / n of the bytes through its slowest link (Patarasuk and Yuan 2009, section 3)."""
    inside = layout.world <= cluster.ranks_per_node
    speed = cluster.link_gb_per_s if inside else cluster.network_gb_per_s
    if not speed:
        return ""
    ranks = layout.dp * layout.cp
    seconds = 2 * (ranks - 1) / ranks * reduced / (speed * 1e9)
    return f"{seconds * 1e3:.3g} ms at the {speed:g} GB/s of {'a node' if inside else 'the network'}"
