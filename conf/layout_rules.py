"""What the degrees of parallelism must satisfy together with the model, the batch and the number of ranks."""

from collections.abc import Iterator
from dataclasses import replace

from conf.case import WORLD_SIZE, Case, Violation, divisible, divisors, multiples, shown


def cut_widths(case: Case) -> list[tuple[str, str]]:
    """(setting of a feed-forward width, degree that cuts it): of the dense layers and of the shared experts, which are
    cut over the tensor-parallel ranks, and of the experts."""
    dense, experts, shared = "model.ffn_hidden_size", "model.moe.ffn_hidden_size", "model.moe.shared_ffn_hidden_size"
    cut = [(dense, "parallel.tp")]
    if case["model.moe.num_experts"]:
        experts = dense if case[experts] is None else experts
        shared = experts if case[shared] is None else shared
        cut += [(shared, "parallel.tp")] if case["model.moe.num_shared_experts"] else []
        cut += [(experts, "parallel.etp")]
    return list(dict.fromkeys(cut))


def layout_rules(case: Case) -> Iterator[Violation]:
    tp, pp, cp, ep, etp = (f"parallel.{key}" for key in ("tp", "pp", "cp", "ep", "etp"))
    yield from divisible(case, WORLD_SIZE, tp, pp, cp)
    for size in ("num_attention_heads", "num_query_groups", "vocab_size"):
        if case[f"model.{size}"] is not None:
            yield from divisible(case, f"model.{size}", tp)
    for width, degree in cut_widths(case):
        yield from divisible(case, width, degree)
    if case["parallel.pp_layers"] is None:
        yield from _even_stages(case)
    elif case[pp] > 1:
        yield from _uneven_stages(case)
    if case["model.moe.num_experts"]:
        yield from divisible(case, WORLD_SIZE, etp, ep, pp)
        yield from divisible(case, "model.moe.num_experts", ep)
        if case["model.moe.expert_bias"]:
            yield from divisible(case, "model.hidden_size", etp)
    if case["parallel.overlap_param_gather"] and not case["parallel.overlap_grad_reduce"]:
        grads = "parallel.overlap_grad_reduce"
        yield Violation(
            f"parallel.overlap_param_gather=true needs {grads}=true (their buckets are the same)",
            f"it is {shown(case[grads])}",
            {grads: [True], "parallel.overlap_param_gather": [None]},
        )
    # A sparse layer spreads its tokens over the tensor-parallel ranks, with or without sequence parallelism.
    cuts_tokens = case["parallel.sequence_parallel"] or case["model.moe.num_experts"]
    sequence = "train.sequence_length"
    if case[cp] > 1 and case[sequence] % (2 * case[cp]):
        yield Violation(
            f"{sequence} % (2 * parallel.cp) == 0 (a rank attends from an early and a late piece)",
            f"{case[sequence]} % {2 * case[cp]} = {case[sequence] % (2 * case[cp])}",
            {cp: divisors(case[cp], case[sequence]), sequence: multiples(case[sequence], 2 * case[cp])},
        )
    elif cuts_tokens:
        yield from divisible(case, sequence, cp, tp)


def _even_stages(case: Case) -> Iterator[Violation]:
    """The model is given: where its layers can be spread unevenly, that is the nearest that works."""
    layers, chunks = case["model.num_layers"], case.product("parallel.pp", "parallel.vpp")
    for violation in divisible(case, "model.num_layers", "parallel.pp", "parallel.vpp"):
        repairs = dict(violation.repairs)
        if layers >= chunks > 1:
            del repairs["model.num_layers"]
            repairs = {"parallel.pp_layers": [_spread(layers, chunks)], **repairs}
        yield replace(violation, repairs=repairs)


def _spread(layers: int, chunks: int) -> list[int]:
    """As even as it can be, the earlier ones first: 61 on 16 -> thirteen of 4 and three of 3."""
    return [layers // chunks + (i < layers % chunks) for i in range(chunks)]


def _uneven_stages(case: Case) -> Iterator[Violation]:
    given, layers = case["parallel.pp_layers"], case["model.num_layers"]
    chunks = case.product("parallel.pp", "parallel.vpp")
    even = _spread(layers, chunks)
    repairs = {"parallel.pp_layers": [even, None] if layers >= chunks else [None]}
    what = "parallel.pp * parallel.vpp" if case["parallel.vpp"] else "parallel.pp"
    if len(given) != chunks:
        yield Violation(f"parallel.pp_layers has {what} numbers", f"{len(given)} != {chunks}", repairs)
    elif min(given) < 1:
        yield Violation("every number of parallel.pp_layers >= 1", f"it is {shown(given)}", repairs)
    elif sum(given) != layers:
        numbers = f"{' + '.join(map(str, given))} = {sum(given)} != {layers}"
        yield Violation(
            "the sum of parallel.pp_layers == model.num_layers", numbers, repairs | {"model.num_layers": [sum(given)]}
        )


def batch_rules(case: Case) -> Iterator[Violation]:
    batch, micro = "train.global_batch_size", "train.micro_batch_size"
    model_parallel = case.product("parallel.tp", "parallel.pp", "parallel.cp")
    if case[WORLD_SIZE] % model_parallel:
        return  # the layout's violation; the data-parallel size is unknown
    data_parallel = case[WORLD_SIZE] // model_parallel
    per_round = case[micro] * data_parallel
    if case[batch] % per_round:
        yield Violation(
            f"{batch} % ({micro} * data-parallel size) == 0",
            f"{case[batch]} % ({case[micro]} * {data_parallel}) = {case[batch] % per_round}",
            {batch: multiples(case[batch], per_round), micro: divisors(case[micro], case[batch])},
        )
    elif case["parallel.vpp"] and case[batch] // per_round % case["parallel.pp"]:
        rounds, stages = case[batch] // per_round, case["parallel.pp"]
        yield Violation(
            "with parallel.vpp, micro-batches per step % parallel.pp == 0",
            f"{case[batch]} / ({case[micro]} * {data_parallel}) = {rounds} and {rounds} % {stages} = {rounds % stages}",
            {
                batch: multiples(case[batch], per_round * stages),
                micro: divisors(case[micro], case[batch]),
                "parallel.vpp": [None],
            },
        )
