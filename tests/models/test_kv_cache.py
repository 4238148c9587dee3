"""Text generation with a key/value cache computes what the whole context computes: for every kind of attention, in
batches of sequences of unequal length, under every layout that has a cache."""

from typing import Any

import pytest
import torch

from benchmarks.parity import VARIANTS
from benchmarks.tiny import SEQUENCE, VOCABULARY, Variant, build_engine, started
from conf.schema import ParallelConfig
from models.cached_logits import CachedLogits
from models.logits import next_token_logits
from parallel.engine import Engine
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import random

LIMIT = 1e-5
WINDOW = Variant({"sliding_window": 4, "full_attention_every": 2})
CHUNK = Variant({"attention_chunk_size": 5, "logit_softcap": 2.0, "no_rope_every": 2})
ATTENTION = {name: VARIANTS[name] for name in ("drops", "qwen3", "olmoe", "rope", "mla", "mla_documents", "gpt_oss")}
ATTENTION |= {name: VARIANTS[name] for name in ("llama4", "phimoe", "gated", "gated_dense", "chunks", "dense")}
ATTENTION |= {"window": WINDOW, "chunk": CHUNK, "deepseek": VARIANTS["deepseek"], "sinkhorn": VARIANTS["sinkhorn"]}
PROMPTS = [[5, 9, 2], [33, 60, 7, 8, 1, 44, 3, 21, 9], [17], [2, 2, 40, 11, 30, 6]]
"""Longer and shorter than windows and chunks; the longest comes to the limit of the context."""


def randomise(engine: Engine) -> None:
    """Norms begin as ones, biases and sinks as zeros, and the other weights small: all that would hide errors."""
    with torch.no_grad():
        for module in engine.modules:
            for seed, (name, parameter) in enumerate(module.named_parameters()):
                if parameter.dim() == 1:
                    parameter.copy_(0.5 * random(*parameter.shape, seed=seed) + ("norm" in name))
                else:
                    parameter.mul_(3.0)


def largest_deviations(engine: Engine, variant: Variant, steps: int) -> list[float]:
    """Of the logits after each step from those of the whole context, relative to the largest logit."""
    model = variant.config()
    cached, contexts = CachedLogits(engine, model, SEQUENCE), [list(prompt) for prompt in PROMPTS]
    logits_RV, apart = cached.start(contexts), []
    for step in range(steps):
        wanted_RV = torch.stack([next_token_logits(engine, VOCABULARY, context) for context in contexts])
        apart.append(((logits_RV - wanted_RV).abs().max() / wanted_RV.abs().max()).item())
        tokens = [(7 * step + 13 * row + 1) % VOCABULARY for row in range(len(contexts))]
        for context, token in zip(contexts, tokens, strict=True):
            if len(context) == SEQUENCE:
                del context[: SEQUENCE // 2]
            context.append(token)
        logits_RV = cached.step(tokens)
    return apart


@pytest.mark.parametrize("name", ATTENTION)
def test_the_cache_changes_nothing(name: str, runtime: Runtime) -> None:
    """Eleven steps: the longest sequence outgrows the context."""
    engine = build_engine(runtime, ATTENTION[name], optim=None)
    randomise(engine)
    apart = largest_deviations(engine, ATTENTION[name], steps=11)
    assert max(apart) <= LIMIT, apart


def measured(world: World, degrees: dict[str, Any], names: list[str]) -> dict[str, list[float]]:
    with started(world, ParallelConfig(**degrees)) as runtime:
        found = {}
        for name in names:
            engine = build_engine(runtime, ATTENTION[name], optim=None)
            randomise(engine)
            found[name] = largest_deviations(engine, ATTENTION[name], steps=4)
        return found


LAYOUTS = [
    (2, {"tp": 2}, ["drops", "mla", "gpt_oss", "llama4", "olmoe", "gated", "chunks"]),
    (2, {"ep": 2}, ["drops", "deepseek", "mla_documents"]),
    (2, {"pp": 2}, ["gpt_oss", "mla", "llama4", "phimoe"]),
    (2, {"etp": 2}, ["drops"]),
    (2, {"pp": 2, "vpp": 2}, ["drops", "mla"]),
    (4, {"tp": 2, "pp": 2, "ep": 2}, ["gpt_oss", "mla"]),
    (2, {"tp": 2, "ep": 2}, ["drops"]),
]


@pytest.mark.parametrize(("size", "degrees", "names"), LAYOUTS, ids=str)
def test_a_layout_changes_nothing(size: int, degrees: dict[str, Any], names: list[str], ranks: RankPool) -> None:
    for found in ranks.run(size, measured, degrees, names, timeout=120.0):
        for name, apart in found.items():
            assert max(apart) <= LIMIT, (name, apart)
