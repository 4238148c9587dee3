"""Rules for the sizes and the layout with precision=fp8."""

from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, divisors, multiples
from conf.layout_rules import sharded_widths

FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale (BLOCK of ops/fp8_numerics.py)."""


def fp8_layers(first_layers_high: int, last_layers_high: int, num_layers: int) -> range:
    """The layers in FP8: all except the first and last ones, which the settings keep in bf16."""
    return range(first_layers_high, num_layers - last_layers_high)


def fp8_rules(cfg: ConfigView) -> Iterator[Violation]:
    """At least one layer is in FP8, and no block that shares a scale straddles ranks."""
    if cfg["precision"] != "fp8":
        return
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
        product = FP8_BLOCK * (cfg[degree] if degree else 1)
        if size % product:
            suggestions = {degree: divisors(cfg[degree], size // FP8_BLOCK or 1)} if product > FP8_BLOCK else {}
            suggestions |= {name: multiples(size, product)} if name.startswith("model.") else {}
            actual = f"{size} % {product} = {size % product}"
            rule = f"with precision=fp8, {name} % {f'({FP8_BLOCK} * {degree})' if degree else FP8_BLOCK} == 0"
            yield Violation(rule, actual, suggestions | {"precision": ["bf16"]})
