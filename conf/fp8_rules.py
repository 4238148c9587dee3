"""Rules for the sizes and the layout with precision=fp8."""

from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, divisors, format_value, multiples
from conf.layout_rules import sharded_widths

FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale (BLOCK of ops/fp8_numerics.py)."""


def fp8_layers(first_layers_high: int, last_layers_high: int, num_layers: int) -> range:
    """The layers in FP8: all except the first and last ones, which the settings keep in bf16."""
    return range(first_layers_high, num_layers - last_layers_high)


ONLY_TE = ("delayed", "mxfp8")
"""Recipes that fp8.kernels=te alone has."""
CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
"""Of the GPUs of conf/cluster, by their names."""
NEEDED = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""By the recipe with fp8.kernels=te: the compute capability that TransformerEngine asks for."""


def _te_rules(cfg: ConfigView) -> Iterator[Violation]:
    """What fp8.kernels=te goes together with. Whether the installed version and the GPU have the recipe turns out on
    the ranks (ops.te_recipes)."""
    recipe, kernels = cfg["fp8.recipe"], "fp8.kernels"
    if cfg[kernels] != "te":
        if recipe in ONLY_TE:
            instead = {"fp8.recipe": ["tensorwise" if recipe == "delayed" else "blockwise"], kernels: ["te"]}
            yield Violation(f"fp8.recipe={recipe} needs {kernels}=te", f"it is {cfg[kernels]}", instead)
        return
    if recipe == "rowwise":
        yield Violation(
            f"{kernels}=te has fp8.recipe=blockwise, tensorwise, delayed and mxfp8",
            "it is rowwise",
            {"fp8.recipe": ["tensorwise"], kernels: ["auto"]},
        )
    elif (has := CAPABILITIES.get(cfg["cluster.name"], (99, 0))) < NEEDED[recipe]:
        works = [other for other in ("blockwise", "tensorwise") if has >= NEEDED[other]]
        yield Violation(
            f"{kernels}=te with fp8.recipe={recipe} needs compute capability {_dotted(NEEDED[recipe])} or newer",
            f"cluster={cfg['cluster.name']} has {_dotted(has)}",
            {"fp8.recipe": works} if works else {"precision": ["bf16"]},
        )
    if cfg["fp8.weight_gradient"] == "bf16":
        yield Violation(
            f"{kernels}=te computes weight gradients in FP8",
            "fp8.weight_gradient is bf16",
            {"fp8.weight_gradient": [None], kernels: ["auto"]},
        )
    if cfg["model.transformer_impl"] == "local":
        yield Violation(
            f"{kernels}=te needs model.transformer_impl other than local",
            "it is local, which is nothing of TransformerEngine",
            {"model.transformer_impl": ["auto"], kernels: ["auto"]},
        )
    yield from _te_layer_rules(cfg)


def _te_layer_rules(cfg: ConfigView) -> Iterator[Violation]:
    """A layer of TransformerEngine is called once in a micro-batch, with whole weights and rows that FP8 can take."""
    recipe, kernels = cfg["fp8.recipe"], "fp8.kernels"
    needed = [("fp8.linear_layers", True), ("lora.rank", None)]
    if cfg["model.moe.num_experts"]:
        needed += [("model.moe.overlap_degree", 1), ("model.moe.expert_chunk_rows", None)]
    for key, value in needed:
        if cfg[key] != value:
            rule, actual = f"{kernels}=te needs {key}={format_value(value)}", f"it is {format_value(cfg[key])}"
            yield Violation(rule, actual, {key: [value], kernels: ["auto"]})
    recompute = cfg["model.recompute"]
    if recipe == "delayed" and [*recompute] not in ([], ["norm"]):
        without = [part for part in recompute if part == "norm"]
        yield Violation(
            "fp8.recipe=delayed needs model.recompute without linear layers, whose amaxes would count twice",
            f"it is {format_value(recompute)}",
            {"model.recompute": [without], "fp8.recipe": ["tensorwise"]},
        )
    multiple, length = (32 if recipe == "mxfp8" else 16), "train.sequence_length"
    latent, degrees = cfg["model.kv_lora_rank"] is not None, ["parallel.cp"]
    if latent and cfg["parallel.sequence_parallel"]:  # a rank projects its own tokens down
        degrees.append("parallel.tp")
    ranks = cfg.product(*degrees)
    rows = cfg["train.micro_batch_size"] * cfg[length] // ranks
    if rows % multiple:
        yield Violation(
            f"{kernels}=te needs train.micro_batch_size * {length} / {' / '.join(degrees)} % {multiple} == 0",
            f"{rows} % {multiple} = {rows % multiple}",
            {length: multiples(cfg[length], multiple * ranks), kernels: ["auto"]},
        )
    rope = "model.qk_rope_head_dim"
    if latent and cfg[rope] % multiple:
        yield Violation(
            f"{kernels}=te needs {rope} % {multiple} == 0",
            f"{cfg[rope]} % {multiple} = {cfg[rope] % multiple}",
            {rope: multiples(cfg[rope], multiple), kernels: ["auto"]},
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def fp8_rules(cfg: ConfigView) -> Iterator[Violation]:
    """At least one layer is in FP8, and no block that shares a scale straddles ranks."""
    if cfg["precision"] != "fp8":
        return
    yield from _te_rules(cfg)
    block = {"delayed": 16, "tensorwise": 16, "mxfp8": 32}.get(cfg["fp8.recipe"], FP8_BLOCK)
    block = block if cfg["fp8.kernels"] == "te" else FP8_BLOCK
    first, last, layers = "fp8.first_layers_high", "fp8.last_layers_high", "model.num_layers"
    if cfg[first] + cfg[last] >= cfg[layers]:
        yield Violation(
            f"{first} + {last} < {layers} (else no layer would be in FP8)",
            f"{cfg[first]} + {cfg[last]} >= {cfg[layers]}",
            {key: range(cfg[key] - 1, -1, -1) for key in (first, last) if cfg[key]} | {"precision": ["bf16"]},
        )
    linear = cfg["fp8.linear_layers"]
    inside = fp8_layers(cfg[first], cfg[last], cfg[layers])
    if not linear and not any(layer in inside for layer in cfg["model.sparse_layers"]):
        yield Violation(
            "fp8.linear_layers=true if no layer in FP8 has experts (else no layer would be in FP8)",
            "fp8.linear_layers=false",
            {"fp8.linear_layers": [True], "precision": ["bf16"]},
        )
    # Scales of blocks that straddle ranks would depend on the layout.
    widths = [(key, cfg[key], degree) for key, degree in sharded_widths(cfg)]
    sharded = [w for w in widths if w[2] == "parallel.tp"]
    hidden = ("model.hidden_size", cfg["model.hidden_size"], None)
    if cfg["model.kv_lora_rank"] is not None:
        up = cfg["model.num_attention_heads"] * (cfg["model.qk_nope_head_dim"] + cfg["model.v_head_dim"])
        ranks = [(key, cfg[key] or 0, None) for key in ("model.q_lora_rank", "model.kv_lora_rank")]
        sharded = [hidden, *sharded, *ranks, ("the width of queries", cfg["model.query_width"], "parallel.tp")]
        sharded += [("the width of keys (without position) and values", up, "parallel.tp")]
        sharded += [("the width of values", cfg["model.output_width"], "parallel.tp")]
    elif cfg["model.head_dim"] is None:  # the queries are as wide as the hidden size
        sharded.insert(0, ("model.hidden_size", cfg["model.hidden_size"], "parallel.tp"))
    else:
        sharded = [hidden, *sharded, ("the width of queries", cfg["model.query_width"], "parallel.tp")]
    if cfg["model.kv_lora_rank"] is None:
        sharded += [("the width of keys and values", 2 * cfg["model.key_width"], "parallel.tp")]
        sharded += [("the number of gates of attention", cfg["model.gate_width"], "parallel.tp")]
    for name, size, degree in [*(sharded if linear else []), *(w for w in widths if w[2] == "parallel.etp")]:
        product = block * (cfg[degree] if degree else 1)
        if size % product:
            suggestions = {degree: divisors(cfg[degree], size // block or 1)} if product > block else {}
            suggestions |= {name: multiples(size, product)} if name.startswith("model.") else {}
            actual = f"{size} % {product} = {size % product}"
            rule = f"with precision=fp8, {name} % {f'({block} * {degree})' if degree else block} == 0"
            yield Violation(rule, actual, suggestions | {"precision": ["bf16"]})
