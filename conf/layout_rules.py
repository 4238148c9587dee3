"""Rules for the degrees of parallelism with the model, the batch and the number of ranks."""

import math
from collections.abc import Iterator
from dataclasses import replace

from conf.config_view import WORLD_SIZE, ConfigView, Violation, divisible, divisors, format_value, multiples
from conf.pipeline_layout import distribute, text_rules


def sharded_widths(cfg: ConfigView) -> list[tuple[str, str]]:
    """(setting of a feed-forward hidden size, degree over which it is sharded), for the dense layers, the shared
    experts and the experts."""
    dense, experts, shared = "model.ffn_hidden_size", "model.moe.ffn_hidden_size", "model.moe.shared_ffn_hidden_size"
    widths = [(dense, "parallel.tp")]
    if cfg["model.moe.num_experts"]:
        experts = dense if cfg[experts] is None else experts
        shared = experts if cfg[shared] is None else shared
        widths += [(shared, "parallel.tp")] if cfg["model.moe.num_shared_experts"] else []
        widths += [(experts, "parallel.etp")]
    return list(dict.fromkeys(widths))


def layout_rules(cfg: ConfigView) -> Iterator[Violation]:
    tp, pp, cp, ep, etp = (f"parallel.{key}" for key in ("tp", "pp", "cp", "ep", "etp"))
    yield from divisible(cfg, WORLD_SIZE, tp, pp, cp)
    for size in ("num_attention_heads", "num_query_groups", "vocab_size"):
        if cfg[f"model.{size}"] is not None:
            yield from divisible(cfg, f"model.{size}", tp)
    for width, degree in sharded_widths(cfg):
        yield from divisible(cfg, width, degree)
    uneven = cfg[pp] > 1  # else unused
    if cfg["parallel.pp_layout"] is not None and uneven:
        yield from text_rules(cfg, distribute(cfg["model.num_layers"], cfg.product(pp, "parallel.vpp")))
    elif cfg["parallel.pp_layers"] is not None and uneven:
        yield from _uneven_stages(cfg)
    elif cfg["parallel.pp_layers"] is None and cfg["parallel.pp_layout"] is None:
        yield from _even_stages(cfg)
    if cfg["model.moe.num_experts"]:
        yield from divisible(cfg, WORLD_SIZE, etp, ep, pp)
        yield from (
            _expert_parts(cfg) if cfg["model.moe.overlap_degree"] > 1 else divisible(cfg, "model.moe.num_experts", ep)
        )
        if cfg["model.moe.expert_bias"]:
            yield from divisible(cfg, "model.hidden_size", etp)
    yield from _instances(cfg)
    if cfg["parallel.overlap_param_gather"] and not cfg["parallel.overlap_grad_reduce"]:
        grads = "parallel.overlap_grad_reduce"
        yield Violation(
            f"parallel.overlap_param_gather=true needs {grads}=true (both use the same buckets)",
            f"it is {format_value(cfg[grads])}",
            {grads: [True], "parallel.overlap_param_gather": [None]},
        )
    # Sparse layers distribute tokens over the tensor-parallel ranks, with or without sequence parallelism.
    shards_tokens = cfg["parallel.sequence_parallel"] or cfg["model.moe.num_experts"]
    sequence = "train.sequence_length"
    if cfg[cp] > 1 and cfg[sequence] % (2 * cfg[cp]):
        yield Violation(
            f"{sequence} % (2 * parallel.cp) == 0 (each rank attends from an early and a late half)",
            f"{cfg[sequence]} % {2 * cfg[cp]} = {cfg[sequence] % (2 * cfg[cp])}",
            {cp: divisors(cfg[cp], cfg[sequence]), sequence: multiples(cfg[sequence], 2 * cfg[cp])},
        )
    elif shards_tokens:
        yield from divisible(cfg, sequence, cp, tp)


def _instances(cfg: ConfigView) -> Iterator[Violation]:
    """Every instance has the same number of data-parallel ranks, on both grids."""
    instances, world = "parallel.optimizer_instances", cfg[WORLD_SIZE]
    grids = {"data-parallel size": cfg.product("parallel.tp", "parallel.pp", "parallel.cp")}
    if cfg["model.moe.num_experts"]:
        experts = cfg.product("parallel.etp", "parallel.ep", "parallel.pp")
        grids["data-parallel size of the experts"] = experts
    if any(world % sharded for sharded in grids.values()):
        return  # another violation; these sizes are undefined
    common = math.gcd(*(world // sharded for sharded in grids.values()))
    for name, sharded in grids.items():
        size = world // sharded
        if size % cfg[instances]:
            yield Violation(
                f"{name} % {instances} == 0",
                f"{size} % {cfg[instances]} = {size % cfg[instances]}",
                {instances: divisors(cfg[instances], common), WORLD_SIZE: multiples(world, sharded * cfg[instances])},
            )


def _expert_parts(cfg: ConfigView) -> Iterator[Violation]:
    """Rows that travel in parts."""
    degree, dispatcher = "model.moe.overlap_degree", "model.moe.dispatcher"
    for violation in divisible(cfg, "model.moe.num_experts", "parallel.ep", degree):
        yield replace(violation, rule=f"{violation.rule} (a part has as many experts of every rank)")
    if cfg[dispatcher] not in ("auto", "all_to_all"):
        yield Violation(
            f"{degree} > 1 needs {dispatcher}=all_to_all",
            f"it is {cfg[dispatcher]}, by which a token travels once for all experts of a rank",
            {dispatcher: ["auto"], degree: [1]},
        )


def _even_stages(cfg: ConfigView) -> Iterator[Violation]:
    """The same number of layers per stage. Suggests uneven stages before another number of layers."""
    layers, chunks = cfg["model.num_layers"], cfg.product("parallel.pp", "parallel.vpp")
    for violation in divisible(cfg, "model.num_layers", "parallel.pp", "parallel.vpp"):
        suggestions = dict(violation.suggestions)
        if layers >= chunks > 1:
            del suggestions["model.num_layers"]
            suggestions = {"parallel.pp_layers": [distribute(layers, chunks)], **suggestions}
        yield replace(violation, suggestions=suggestions)


def _uneven_stages(cfg: ConfigView) -> Iterator[Violation]:
    given, layers = cfg["parallel.pp_layers"], cfg["model.num_layers"]
    chunks = cfg.product("parallel.pp", "parallel.vpp")
    even = distribute(layers, chunks)
    suggestions = {"parallel.pp_layers": [even, None] if layers >= chunks else [None]}
    what = "parallel.pp * parallel.vpp" if cfg["parallel.vpp"] else "parallel.pp"
    if len(given) != chunks:
        yield Violation(f"parallel.pp_layers has {what} elements", f"{len(given)} != {chunks}", suggestions)
    elif min(given) < 0 or 0 in given[1:-1]:
        yield Violation(
            "every element of parallel.pp_layers >= 1 (0 for the first, which has the embedding, and the last)",
            f"it is {format_value(given)}",
            suggestions,
        )
    elif sum(given) != layers:
        actual = f"{' + '.join(map(str, given))} = {sum(given)} != {layers}"
        yield Violation(
            "the sum of parallel.pp_layers == model.num_layers",
            actual,
            suggestions | {"model.num_layers": [sum(given)]},
        )


def batch_rules(cfg: ConfigView) -> Iterator[Violation]:
    batch, micro = "train.global_batch_size", "train.micro_batch_size"
    model_parallel = cfg.product("parallel.tp", "parallel.pp", "parallel.cp")
    if cfg[WORLD_SIZE] % model_parallel:
        return  # a violation of layout_rules; the data-parallel size is undefined
    data_parallel = cfg[WORLD_SIZE] // model_parallel
    per_round = cfg[micro] * data_parallel
    if cfg[batch] % per_round:
        yield Violation(
            f"{batch} % ({micro} * data-parallel size) == 0",
            f"{cfg[batch]} % ({cfg[micro]} * {data_parallel}) = {cfg[batch] % per_round}",
            {batch: multiples(cfg[batch], per_round), micro: divisors(cfg[micro], cfg[batch])},
        )
    elif cfg["parallel.vpp"] and cfg[batch] // per_round % cfg["parallel.pp"]:
        rounds, stages = cfg[batch] // per_round, cfg["parallel.pp"]
        yield Violation(
            "with parallel.vpp, micro-batches per step % parallel.pp == 0",
            f"{cfg[batch]} / ({cfg[micro]} * {data_parallel}) = {rounds} and {rounds} % {stages} = {rounds % stages}",
            {
                batch: multiples(cfg[batch], per_round * stages),
                micro: divisors(cfg[micro], cfg[batch]),
                "parallel.vpp": [None],
            },
        )
