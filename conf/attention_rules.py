"""Rules for the settings of attention and of rotary embeddings."""

import dataclasses
import math
from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, divisible, divisors, format_value, multiples

EVEN = "is even (rotary embeddings rotate pairs)"


def attention_rules(cfg: ConfigView) -> Iterator[Violation]:
    yield from _heads(cfg) if cfg["model.kv_lora_rank"] is None else _latent(cfg)
    yield from _local_attention(cfg)
    every, layers = "model.no_rope_every", "model.num_layers"
    if cfg[every] is not None and cfg[every] > cfg[layers]:
        actual = f"{cfg[every]} > {cfg[layers]}, so every layer would have a rotary embedding"
        yield Violation(f"{every} <= {layers}", actual, {every: [None], layers: [cfg[every]]})
    yield from _rope_scaling(cfg)


def _heads(cfg: ConfigView) -> Iterator[Violation]:
    hidden, heads, head_dim = "model.hidden_size", "model.num_attention_heads", "model.head_dim"
    if cfg[head_dim] is not None:
        if cfg[head_dim] % 2:
            yield Violation(f"{head_dim} {EVEN}", f"it is {cfg[head_dim]}", {head_dim: [cfg[head_dim] + 1]})
    elif cfg[hidden] % cfg[heads]:
        for violation in divisible(cfg, hidden, heads):
            suggestions = {**violation.suggestions, head_dim: multiples(cfg[hidden] // cfg[heads], 2)}
            yield dataclasses.replace(violation, suggestions=suggestions)
    elif cfg[hidden] // cfg[heads] % 2:
        yield Violation(
            f"{hidden} / {heads} {EVEN}",
            f"{cfg[hidden]} / {cfg[heads]} = {cfg[hidden] // cfg[heads]}",
            {heads: divisors(cfg[heads], cfg[hidden]), hidden: multiples(cfg[hidden], 2 * cfg[heads])},
        )
    if cfg["model.num_query_groups"] is not None:
        yield from divisible(cfg, heads, "model.num_query_groups")
    partial, width, rotated = "model.partial_rotary_factor", cfg["model.head_width"], cfg["model.rotary_width"]
    if width % 2 == 0 and (rotated % 2 or rotated < 2):
        nearest = sorted(range(2, width + 1, 2), key=lambda n: abs(n - rotated))
        yield Violation(
            f"the integer part of {partial} * the size of a head {EVEN} and positive",
            f"it is {rotated}",
            {partial: [n / width for n in nearest if int(width * (n / width)) == n]},
        )


def _latent(cfg: ConfigView) -> Iterator[Violation]:
    nope, rope, value = "model.qk_nope_head_dim", "model.qk_rope_head_dim", "model.v_head_dim"
    if cfg[rope] % 2:
        yield Violation(f"{rope} {EVEN}", f"it is {cfg[rope]}", {rope: [cfg[rope] + 1]})
    if cfg[value] > cfg["model.head_width"]:
        yield Violation(
            f"{value} <= {nope} + {rope} (values are padded to the width of queries and keys)",
            f"{cfg[value]} > {cfg[nope]} + {cfg[rope]}",
            {value: [cfg["model.head_width"]], nope: [cfg[value] - cfg[rope]]},
        )


def _rope_scaling(cfg: ConfigView) -> Iterator[Violation]:
    section = "model.rope_scaling"
    kind, original, theta = cfg[f"{section}.type"], f"{section}.original_max_position_embeddings", "model.rope_theta"
    if kind in ("llama3", "yarn", "longrope") and cfg[original] is None:
        actual = "it is null: set it to the length of sequences in pre-training"
        suggestions = {f"{section}.type": [None, "linear"]}
        yield Violation(f"{section}.type={kind} needs {original}", actual, suggestions)
    factors = cfg["model.rotary_width"] // 2
    for key in (f"{section}.short_factor", f"{section}.long_factor") if kind == "longrope" else ():
        if len(cfg[key]) != factors or not all(0 < value < math.inf for value in cfg[key]):
            yield Violation(
                f"{section}.type=longrope needs {key} of {factors} positive numbers, one for each frequency",
                f"it is {format_value(cfg[key])}",
                {f"{section}.type": [None, "linear"]},
            )
    low, high = f"{section}.low_freq_factor", f"{section}.high_freq_factor"
    if kind == "llama3" and cfg[low] > cfg[high]:
        actual = f"{cfg[low]:g} > {cfg[high]:g}"
        yield Violation(f"{low} <= {high}", actual, {high: [4 * cfg[low]], low: [cfg[high] / 4]})
    slow, fast = f"{section}.beta_slow", f"{section}.beta_fast"
    if kind == "yarn" and cfg[slow] > cfg[fast]:
        actual = f"{cfg[slow]:g} > {cfg[fast]:g}"
        yield Violation(f"{slow} <= {fast}", actual, {fast: [cfg[slow]], slow: [cfg[fast]]})
    if kind == "yarn" and cfg[theta] <= 1:
        yield Violation(f"{section}.type=yarn needs {theta} > 1", f"it is {cfg[theta]:g}", {theta: [10000.0]})


def _local_attention(cfg: ConfigView) -> Iterator[Violation]:
    window, chunk, first = "model.sliding_window", "model.attention_chunk_size", "model.first_full_attention_layers"
    if cfg[window] is None and cfg[chunk] is None:
        return
    if cfg[window] is not None and cfg[chunk] is not None:
        yield Violation(
            f"{window} or {chunk} is null (a layer has local attention of one kind)",
            f"they are {cfg[window]} and {cfg[chunk]}",
            {chunk: [None], window: [None]},
        )
    if not cfg["model.local_layers"]:
        yield Violation(
            f"{first} and model.full_attention_every leave a layer with local attention",
            f"{first} is {cfg[first]} of {cfg['model.num_layers']} layers",
            {first: range(cfg["model.num_layers"] - 1, -1, -1), window: [None], chunk: [None]},
        )
