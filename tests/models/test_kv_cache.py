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
from moe.dispatcher import LocalDispatcher
from ops.dispatch import Assignments
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
    (3, {"pp": 3, "pp_layers": [0, 4, 0]}, ["drops"]),
    (4, {"tp": 2, "pp": 2, "ep": 2}, ["gpt_oss", "mla"]),
    (2, {"tp": 2, "ep": 2}, ["drops"]),
]


@pytest.mark.parametrize(("size", "degrees", "names"), LAYOUTS, ids=str)
def test_a_layout_changes_nothing(size: int, degrees: dict[str, Any], names: list[str], ranks: RankPool) -> None:
    for found in ranks.run(size, measured, degrees, names, timeout=120.0):
        for name, apart in found.items():
            assert max(apart) <= LIMIT, (name, apart)


def test_padding_is_not_routed_and_an_ended_sequence_changes_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = build_engine(runtime, ATTENTION["drops"], optim=None), ATTENTION["drops"].config()
    randomise(engine)
    rows: list[int] = []
    start = LocalDispatcher.start

    def counted(dispatcher: LocalDispatcher, x_TD: torch.Tensor, assignments: Assignments, slots: Any = None) -> Any:
        rows.append(int((assignments.experts_TK < dispatcher.num_experts).sum()))
        return start(dispatcher, x_TD, assignments, slots)

    monkeypatch.setattr(LocalDispatcher, "start", counted)
    cached = CachedLogits(engine, model, SEQUENCE)
    cached.start(PROMPTS)
    assert rows == [model.moe.top_k * sum(map(len, PROMPTS))] * model.num_layers
    rows.clear()
    together = [cached.step([1, None, 2, None])[[0, 2]], cached.step([3, None, 4, None])[[0, 2]]]
    assert rows == [model.moe.top_k * 2] * model.num_layers * 2
    cached.start([PROMPTS[0], PROMPTS[2]])
    for wanted, tokens in zip(together, ([1, 2], [3, 4]), strict=True):
        torch.testing.assert_close(cached.step(tokens), wanted, rtol=1e-5, atol=1e-5)


def test_several_tokens_at_once_are_those_one_by_one(runtime: Runtime) -> None:
    """The second turn of a conversation, short of the limit and past it."""
    for name in ("gpt_oss", "mla", "llama4", "phimoe"):
        engine, model = build_engine(runtime, ATTENTION[name], optim=None), ATTENTION[name].config()
        randomise(engine)
        for further in ([9, 8, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9]):
            cached = CachedLogits(engine, model, SEQUENCE)
            cached.start([PROMPTS[1]])
            got = cached.extend(further)[0]
            wanted = next_token_logits(engine, VOCABULARY, cached.contexts[0])
            assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()
            assert len(cached.contexts[0]) == (12 if len(further) == 3 else SEQUENCE // 2)
