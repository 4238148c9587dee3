"""Collects what a page about a run's router shows: its history, and where the tokens of a text go.

Legend: T tokens of a text, E experts, K assignments per token, L sparse layers.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corpus.tokenizer import Tokenizer
from models.logits import sequence_logits
from ops.routing import Routing
from training.load_checkpoint import LoadedModel
from training.run_files import EXPERT_LOAD, METRICS, json_lines

STEPS = 240
"""Columns of a heat map at most; of a longer run every n-th logged step is shown."""
TYPICAL = 12
"""Tokens listed per expert."""
CURVES = ("loss", "dropped_fraction", "router_entropy", "router_logit_rms", "load_max_over_mean", "dead_experts")


def history(run_dir: Path) -> dict[str, Any]:
    """{"steps", "curves": {name: values}, "load_steps", "load": {layer: [step][expert] load over the mean}, "dropped":
    {layer: values}} of a run, thinned out to STEPS."""
    rows = [row for row in json_lines(run_dir / METRICS) if "loss" in row]
    rows = rows[:: max(1, -(-len(rows) // STEPS))]
    loads: dict[int, list[dict[str, Any]]] = {}
    for row in json_lines(run_dir / EXPERT_LOAD):
        loads.setdefault(row["layer"], []).append(row)
    kept = {layer: found[:: max(1, -(-len(found) // STEPS))] for layer, found in loads.items()}
    return {
        "steps": [row["step"] for row in rows],
        "curves": {name: [row[name] for row in rows] for name in CURVES if all(name in row for row in rows)},
        "load_steps": [row["step"] for row in next(iter(kept.values()), [])],
        "load": {layer: [_over_mean(row["assignments"]) for row in found] for layer, found in kept.items()},
        "dropped": {layer: [row["dropped_fraction"] for row in found] for layer, found in kept.items()},
    }


def _over_mean(loads: list[float]) -> list[float]:
    mean = sum(loads) / len(loads) or 1.0
    return [round(load / mean, 3) for load in loads]


@contextmanager
def recorded_routing(loaded: LoadedModel) -> Iterator[dict[int, list[Routing]]]:
    """What the router of each sparse layer decides while the context lasts, pass by pass."""
    found: dict[int, list[Routing]] = {}
    handles = []
    for module in loaded.built.engine.modules:
        for layer, moe in module.sparse().items():

            def keep(_: nn.Module, __: object, routing: Routing, layer: int = layer) -> None:
                found.setdefault(layer, []).append(routing)

            handles.append(moe.router.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def routed_text(loaded: LoadedModel, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """{"tokens": texts, "experts": {layer: [T][K]}, "gates": {layer: [T][K]}} of a text, sequence by sequence, with
    dropless routing. One rank."""
    config = loaded.built.config
    size = config.train.sequence_length
    experts: dict[int, list[list[int]]] = {}
    gates: dict[int, list[list[float]]] = {}
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        with recorded_routing(loaded) as found:
            sequence_logits(loaded.built.engine, config.model.vocab_size, part, first=len(part) - 1)
        for layer, passes in found.items():
            (routing,) = passes
            experts.setdefault(layer, []).extend(routing.experts_TK[: len(part)].tolist())
            rows = routing.gates_TK[: len(part)].tolist()
            gates.setdefault(layer, []).extend([round(gate, 3) for gate in row] for row in rows)
    return {"tokens": token_texts(ids, tokenizer), "experts": experts, "gates": gates}


def token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of one that ends within a character, its name in the vocabulary."""
    texts = [tokenizer.decode([i]) for i in ids]
    return [
        tokenizer.token(i) or "?" if "\N{REPLACEMENT CHARACTER}" in t else t for i, t in zip(ids, texts, strict=True)
    ]


def typical_tokens(
    texts: list[str], experts_TK: list[list[int]], num_experts: int
) -> list[list[tuple[str, int, float]]]:
    """For each expert the tokens that it gets most often compared with what their frequency alone would give it, as
    (text, times, lift), most typical first."""
    everywhere: Counter[str] = Counter()
    by_expert = [Counter[str]() for _ in range(num_experts)]
    for text, experts in zip(texts, experts_TK, strict=True):
        for expert in experts:
            if expert < num_experts:
                everywhere[text] += 1
                by_expert[expert][text] += 1
    total = sum(everywhere.values()) or 1
    found = []
    for counts in by_expert:
        share = sum(counts.values()) / total
        rated = [(text, n, n / (everywhere[text] * share)) for text, n in counts.items() if n > 1]
        # Lift alone would favour what is rare: it is weighed with how often the token was seen.
        rated.sort(key=lambda one: (-(one[2] - 1) * one[1] ** 0.5, one[0]))
        found.append([(text, n, round(lift, 2)) for text, n, lift in rated[:TYPICAL]])
    return found


def co_activation(experts_TK: list[list[int]], num_experts: int) -> list[list[int]]:
    """[E][E]: tokens that went to both experts."""
    found = [[0] * num_experts for _ in range(num_experts)]
    for experts in experts_TK:
        chosen = [e for e in experts if e < num_experts]
        for a in chosen:
            for b in chosen:
                if a != b:
                    found[a][b] += 1
    return found


def flow(first_TK: list[list[int]], then_TK: list[list[int]], num_experts: int) -> list[list[int]]:
    """[E][E]: tokens by their first choice in one layer and in the next sparse one."""
    found = [[0] * num_experts for _ in range(num_experts)]
    for a, b in zip(first_TK, then_TK, strict=True):
        if max(a[0], b[0]) < num_experts:
            found[a[0]][b[0]] += 1
    return found


def weight_similarity(w_in_LDGF: Tensor) -> list[list[float]]:
    """[E][E]: cosines of the experts' input weights. Weights are compared as they are: experts that compute the same in
    another order of hidden units count as different."""
    flat = w_in_LDGF.detach().float().flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return [[round(value, 3) for value in row] for row in (unit @ unit.t()).cpu().tolist()]


@torch.no_grad()
def collect(loaded: LoadedModel, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the page shows of a run, ready for JSON."""
    config = loaded.built.config
    num_experts = config.model.moe.num_experts
    routed = routed_text(loaded, ids, tokenizer)
    layers = sorted(routed["experts"])
    sparse = {layer: moe for module in loaded.built.engine.modules for layer, moe in module.sparse().items()}
    pairs = itertools.pairwise(layers)
    return {
        "name": loaded.run_dir.name,
        "model": config.model.name,
        "step": loaded.step,
        "experts": num_experts,
        "top_k": config.model.moe.top_k,
        "layers": layers,
        "history": history(loaded.run_dir),
        "text": routed,
        "typical": {i: typical_tokens(routed["tokens"], routed["experts"][i], num_experts) for i in layers},
        "together": {i: co_activation(routed["experts"][i], num_experts) for i in layers},
        "flow": {a: flow(routed["experts"][a], routed["experts"][b], num_experts) for a, b in pairs},
        "similarity": {i: weight_similarity(sparse[i].experts.w_in) for i in layers},
    }
