"""What precision=fp8 asks of sizes and layout."""

from collections.abc import Iterator

from conf.case import Case, Violation, divisors, multiples
from conf.layout_rules import cut_widths

FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale (ops.fp8_numerics.BLOCK)."""


def fp8_layers(first_layers_high: int, last_layers_high: int, num_layers: int) -> range:
    """The layers that compute in FP8: all but the first and the last ones, which the settings keep in bf16."""
    return range(first_layers_high, num_layers - last_layers_high)


def fp8_rules(case: Case) -> Iterator[Violation]:
    """Rules of the FP8 layers and of the blocks that share a scale."""
    if case["precision"] != "fp8":
        return
    first, last, layers = "fp8.first_layers_high", "fp8.last_layers_high", "model.num_layers"
    if case[first] + case[last] >= case[layers]:
        yield Violation(
            f"{first} + {last} < {layers} (else no layer would be in FP8)",
            f"{case[first]} + {case[last]} >= {case[layers]}",
            {key: range(case[key] - 1, -1, -1) for key in (first, last) if case[key]} | {"precision": ["bf16"]},
        )
    linear = case["fp8.linear_layers"]
    inside = fp8_layers(case[first], case[last], case[layers])
    if not linear and not any(layer in inside for layer in case["model.sparse_layers"]):
        yield Violation(
            "fp8.linear_layers=true where no layer in FP8 has experts (else no layer would be in FP8)",
            "fp8.linear_layers=false",
            {"fp8.linear_layers": [True], "precision": ["bf16"]},
        )
    # Blocks of 128 x 128 must not straddle ranks: their scales would depend on the layout.
    widths = [(key, case[key], degree) for key, degree in cut_widths(case)]
    cuts = [w for w in widths if w[2] == "parallel.tp"]
    if case["model.head_dim"] is None:  # the queries are as wide as the hidden size
        cuts.insert(0, ("model.hidden_size", case["model.hidden_size"], "parallel.tp"))
    else:
        uncut = ("model.hidden_size", case["model.hidden_size"], None)
        cuts = [uncut, *cuts, ("the width of queries", case["model.query_width"], "parallel.tp")]
    cuts += [("the width of keys and values", 2 * case["model.key_width"], "parallel.tp")]
    for name, size, degree in [*(cuts if linear else []), *(w for w in widths if w[2] == "parallel.etp")]:
        product = FP8_BLOCK * (case[degree] if degree else 1)
        if size % product:
            repairs = {degree: divisors(case[degree], size // FP8_BLOCK or 1)} if product > FP8_BLOCK else {}
            repairs |= {name: multiples(size, product)} if name.startswith("model.") else {}
            numbers = f"{size} % {product} = {size % product}"
            rule = f"with precision=fp8, {name} % {f'({FP8_BLOCK} * {degree})' if degree else FP8_BLOCK} == 0"
            yield Violation(rule, numbers, repairs | {"precision": ["bf16"]})
