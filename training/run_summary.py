"""The table of a run that `launch.check` prints on a login node: size, batches, memory and communication."""

from dataclasses import asdict

from conf.schema import ClusterConfig, Config
from parallel.layout import Layout
from training.adapters import run_cost
from training.memory_estimate import Memory, memory_per_rank
from training.package_rows import package_rows
from training.planner.rates import has_rates, rates_of
from training.planner.step import predict


def summarize_run(config: Config, layout: Layout, data_tokens: int) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Rows (what, choice, why) of the table, and warnings.

    Args:
        data_tokens: tokens to train on.

    Raises:
        ValueError: weights, gradients and optimizer states do not fit into a rank's memory.
    """
    train, cluster = config.train, config.cluster
    cost = run_cost(config)
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
        *_step_row(config, layout),
        *package_rows(config, bf16=bf16),
    ]
    if reduced:
        rows.append(
            (
                "gradients",
                f"{reduced / 1e9:.3g} GB to reduce per rank and step",
                _reduce_time(reduced, layout, cluster),
            )
        )
    return rows, _check_memory(memory, cluster, _savings(config, bf16=bf16))


def _step_row(config: Config, layout: Layout) -> list[tuple[str, str, str]]:
    """The predicted time of a step, on GPUs whose rates are known."""
    if not (config.cluster.gpus and has_rates(config.cluster.name)):
        return []
    predicted = predict(config, layout, rates_of(config.cluster.name))
    shares = (f"{name} {seconds / predicted.seconds:.0%}" for name, seconds in predicted.parts.most_common(3))
    speed = f"{predicted.tokens_per_second_per_gpu:,.0f} tokens/s and GPU"
    return [("step", f"about {predicted.seconds:.3g} s, {speed}", f"predicted: {', '.join(shares)}, ...")]


def memory_row(memory: Memory, cluster: ClusterConfig) -> tuple[str, str, str]:
    """The memory estimate as a row of the table."""
    parts = {name.replace("_", " "): size / 1e9 for name, size in asdict(memory).items() if size and name != "host"}
    have = f" of {cluster.memory_gb:g} GB" if cluster.memory_gb else ""
    have += f" ({cluster.name})" if cluster.name else ""
    split = ", ".join(f"{name} {size:.3g}" for name, size in parts.items())
    split += f"; and {memory.host / 1e9:.3g} GB of host memory for the optimizer" if memory.host else ""
    return "memory", f"about {memory.total / 1e9:.3g} GB per rank{have}", f"estimate: {split}"


def _savings(config: Config, *, bf16: bool) -> str:
    """Optimizer settings that would reduce memory."""
    optim = config.optim
    unused = {"grad_dtype=bf16": bf16 and optim.grad_dtype == "fp32", "state_dtype=bf16": optim.state_dtype == "fp32"}
    unused["cpu_offload=true"] = config.cluster.gpus and not optim.cpu_offload
    return ", ".join(f"optim.{setting}" for setting, possible in unused.items() if possible)


def _check_memory(memory: Memory, cluster: ClusterConfig, savings: str) -> list[str]:
    if not cluster.memory_gb:
        return []
    certain, have = (memory.total - memory.activations) / 1e9, cluster.memory_gb
    if certain > have:
        raise ValueError(
            f"weights, gradients and optimizer take {certain:.3g} GB per rank, more than the {have:g} GB of "
            f"cluster={cluster.name}; raise parallel.tp, parallel.pp or parallel.ep, or use more ranks"
            + (f"; settings that reduce memory: {savings}" if savings else "")
        )
    if memory.total / 1e9 > 0.9 * have:
        return [
            f"memory is likely to run out: about {memory.total / 1e9:.3g} of {have:g} GB per rank. Lower "
            f"train.micro_batch_size{f', set {savings}' if savings else ''} or shard the model over more ranks"
        ]
    return []


def _reduce_time(reduced: float, layout: Layout, cluster: ClusterConfig) -> str:
    """Time of a ring all-reduce, which sends 2 (n - 1) / n of the bytes over the slowest link (Patarasuk and Yuan 2009,
    section 3)."""
    inside = layout.world <= cluster.ranks_per_node
    speed = cluster.link_gb_per_s if inside else cluster.network_gb_per_s
    if not speed:
        return ""
    ranks = layout.dp * layout.cp
    seconds = 2 * (ranks - 1) / ranks * reduced / (speed * 1e9)
    return f"{seconds * 1e3:.3g} ms at the {speed:g} GB/s of {'a node' if inside else 'the network'}"
