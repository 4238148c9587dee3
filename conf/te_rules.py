"""What TransformerEngine may compute of a run, and what model.transformer_impl=transformer_engine does not go together
with."""

from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, format_value
from conf.fp8_rules import fp8_layers
from conf.schema import Config

KEY = "model.transformer_impl"


def te_parts(config: Config) -> list[str]:
    """What it computes in training on GPUs in bf16, where it is installed and passes its trials, as the start table
    calls it; besides the router, the permutation and the experts, which have several candidates."""
    model, fp8 = config.model, config.fp8
    if model.transformer_impl == "local":
        return []
    in_fp8 = fp8_layers(fp8.first_layers_high, fp8.last_layers_high, model.num_layers)
    is_fp8 = config.precision == "fp8" and fp8.linear_layers and len(in_fp8) == model.num_layers + model.mtp_num_layers
    parts = [] if is_fp8 and model.reward_head else ["linear layers"]  # of FP8 the output layer alone
    fuses = config.lora.rank is None and (model.kv_lora_rank is not None or "norm" not in model.recompute)
    parts += ["norm and linear layer"] if fuses and not is_fp8 else []
    exchanges = config.parallel.cp > 1 and config.parallel.cp_comm_type != "all_gather"
    return [*parts, "context-parallel attention" if exchanges else "attention"]


def cp_comm_type_rules(cfg: ConfigView) -> Iterator[Violation]:
    """What TransformerEngine's attention over context-parallel ranks does not have."""
    comm, cp, gather = "parallel.cp_comm_type", "parallel.cp", "all_gather"
    kind = cfg[comm]
    if kind == gather or cfg[cp] == 1:
        return
    if cfg[KEY] == "local":
        yield Violation(
            f"{comm}={kind} needs {KEY} other than local",
            "it is local, which is nothing of TransformerEngine",
            {KEY: ["auto"], comm: [gather]},
        )
    if cfg["cluster.name"] is not None and not cfg["cluster.gpus"]:
        yield Violation(f"{comm}={kind} needs GPUs", f"cluster={cfg['cluster.name']} has none", {comm: [gather]})
    if cfg["precision"] == "fp32":
        yield Violation(f"{comm}={kind} computes in bf16", "precision is fp32", {"precision": ["bf16"], comm: [gather]})
    lacks = [("model.sliding_window", None), ("model.attention_sinks", False)] if kind == "p2p" else []
    for key, value in lacks:
        if cfg[key] != value:
            actual = f"it is {format_value(cfg[key])}"
            yield Violation(f"{comm}={kind} needs {key}={format_value(value)}", actual, {comm: ["a2a", gather]})
    if kind == "a2a":
        groups = "model.num_query_groups" if cfg["model.kv_lora_rank"] is None else "model.num_attention_heads"
        for key in dict.fromkeys(("model.num_attention_heads", groups)):
            count = cfg[key] or cfg["model.num_attention_heads"]
            if count % (cfg["parallel.tp"] * cfg[cp]):
                yield Violation(
                    f"{comm}=a2a needs {key} % (parallel.tp * {cp}) == 0",
                    f"{count} % {cfg['parallel.tp'] * cfg[cp]} = {count % (cfg['parallel.tp'] * cfg[cp])}",
                    {comm: ["p2p", gather]},
                )


def te_rules(cfg: ConfigView) -> Iterator[Violation]:
    """Whether the package is installed, and computes the same, turns out on the ranks (ops.te)."""
    yield from cp_comm_type_rules(cfg)
    backend = "model.moe.backend"
    if cfg[KEY] == "local" and cfg[backend] == "te":
        yield Violation(
            f"{backend}=te needs {KEY} other than local",
            "it is local, which is nothing of TransformerEngine",
            {KEY: ["auto"], backend: ["auto"]},
        )
    if cfg[KEY] != "transformer_engine":
        return
    if cfg["precision"] == "fp32":
        yield Violation(
            f"{KEY}=transformer_engine computes in bf16",
            "precision is fp32",
            {"precision": ["bf16"], KEY: ["auto"]},
        )
    if cfg["cluster.name"] is not None and not cfg["cluster.gpus"]:
        yield Violation(
            f"{KEY}=transformer_engine needs GPUs", f"cluster={cfg['cluster.name']} has none", {KEY: ["auto"]}
        )
    recompute = cfg["model.recompute"]
    if "norm" in recompute and cfg["model.kv_lora_rank"] is None:  # which has norms of its own, never recomputed
        yield Violation(
            f"{KEY}=transformer_engine computes norms in the linear layers that follow, which keep their "
            "outputs: model.recompute without norm",
            f"it is [{','.join(recompute)}]",
            {"model.recompute": [[part for part in recompute if part != "norm"]], KEY: ["auto"]},
        )
    if cfg["lora.rank"] is not None:
        yield Violation(
            f"{KEY}=transformer_engine computes norms in the linear layers that follow, and adapters read their "
            "outputs: lora.rank=null",
            f"it is {cfg['lora.rank']}",
            {KEY: ["auto"]},
        )
