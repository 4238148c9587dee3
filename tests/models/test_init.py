"""Initial weights: their distribution, and that they do not depend on how the model is cut."""

import math

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig, MoeConfig, ParallelConfig
from models.decoder import ModelChunk
from parallel import process_groups as runtimes
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import build_context, tiny, whole_model


def values_of(stage: ModelChunk) -> dict[str, np.ndarray]:
    return {name: parameter.detach().cpu().numpy() for name, parameter in stage.named_parameters()}


def test_weights_follow_the_truncated_normal_of_switch(runtime: Runtime) -> None:
    """Switch, section 2.4: normal with standard deviation sqrt(s / fan_in), values past two of them drawn again (its
    code is tf.truncated_normal_initializer, which does not make up for the tails that are lost). So by the normal
    density phi, the values' own deviation is sqrt(1 - 4 phi(2) / P(|z| < 2)) = 0.880 of it, and 71.5 % lie within
    one."""
    hidden, ffn, s = 64, 96, 0.1
    moe = MoeConfig(num_experts=8, every=2)
    model = tiny(moe, hidden_size=hidden, ffn_hidden_size=ffn, vocab_size=256, init_scale=s)
    within_two = math.erf(2**0.5)
    shrunk = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / within_two)
    for name, value in values_of(whole_model(model, runtime)).items():
        if "norm" in name:
            assert (value == 1).all()
            continue
        sigma = math.sqrt(s / (ffn if name.endswith(("down.weight", "w_out")) else hidden))
        error = 5 / math.sqrt(value.size)  # five standard errors of a mean of values of size 1
        assert abs(value.mean()) < error * sigma, name
        assert abs(value.std() / sigma - shrunk) < error, name
        assert 1.8 * sigma < abs(value).max() <= 2 * sigma * (1 + 1e-6), name
        assert abs((abs(value) < sigma).mean() - math.erf(0.5**0.5) / within_two) < error, name


def test_the_seed_the_layer_and_the_expert_decide_the_values(runtime: Runtime) -> None:
    model = tiny(MoeConfig(num_experts=4))
    first, same, other = (values_of(whole_model(model, runtime, seed=seed)) for seed in (1, 1, 2))
    drawn = {name for name in first if "norm" not in name}
    assert all((first[name] == same[name]).all() for name in first)
    assert all((first[name] != other[name]).all() for name in drawn)
    for name in ("attention.qkv.weight", "ffn.router.weight", "ffn.experts.w_in", "ffn.experts.w_out"):
        assert (first[f"layers.0.{name}"] != first[f"layers.1.{name}"]).all()
    for name in ("w_in", "w_out"):
        experts = first[f"layers.0.ffn.experts.{name}"]
        assert all((experts[e] != experts[f]).all() for e in range(4) for f in range(e))


def test_values_do_not_depend_on_other_draws(runtime: Runtime) -> None:
    """They come from generators of their own, and leave the global one as it was."""
    model = tiny(MoeConfig(num_experts=4))
    first = values_of(whole_model(model, runtime))
    state = torch.get_rng_state()
    again = values_of(whole_model(model, runtime))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert all((first[name] == again[name]).all() for name in first)


CUTS = {
    "embedding.weight": {"tp": 0},
    "head.weight": {"tp": 0},
    "qkv.weight": {"tp": 0},
    "attention.out.weight": {"tp": 1},
    "up.weight": {"tp": 0},
    "gate.weight": {"tp": 0},
    "down.weight": {"tp": 1},
    "experts.w_in": {"ep": 0, "etp": 3},
    "experts.w_out": {"ep": 0, "etp": 1},
}
"""Which axis each kind of rank has a part of; what is not named here is whole on every rank."""


def initial_values(world: World, parallel: dict[str, int], model: ModelConfig) -> list[dict[str, np.ndarray]]:
    """Runs on a rank: the values of each of its pipeline chunks."""
    layout = Layout.of(ParallelConfig(**parallel), world.size)
    runtime = runtimes.start(world, layout, seed=world.rank, timeout=60, threads=1)
    try:
        context = build_context(model, runtime)
        return [
            values_of(ModelChunk(context, chunk=chunk, sequence_length=16, document_mask=False))
            for chunk in range(layout.vpp)
        ]
    finally:
        runtimes.stop()


@pytest.mark.parametrize(
    ("size", "parallel", "tied"),
    [
        (2, {"tp": 2}, False),
        (2, {"ep": 2}, False),
        (2, {"tp": 2, "etp": 2}, False),
        (2, {"pp": 2, "vpp": 2}, True),
        (4, {"tp": 2, "pp": 2, "ep": 2}, True),
    ],
    ids=str,
)
def test_values_do_not_depend_on_the_layout(
    size: int, parallel: dict[str, int], tied: bool, runtime: Runtime, ranks: RankPool
) -> None:
    """Bit for bit. Which part a rank holds is reckoned here from its number alone: tensor-parallel neighbours first,
    pipeline stages last."""
    moe = MoeConfig(num_experts=4, every=2)
    model = tiny(moe, num_layers=4, num_attention_heads=4, num_query_groups=2, tie_embeddings=tied)
    whole = values_of(whole_model(model, runtime))
    if tied and "pp" in parallel:
        whole["head.weight"] = whole["embedding.weight"]  # the last stage's copy
    covered = {name: np.zeros(value.shape, dtype=bool) for name, value in whole.items()}
    degree = {"tp": 1, "ep": 1, "etp": 1} | parallel
    for rank, chunks in enumerate(ranks.run(size, initial_values, parallel, model, timeout=100)):
        part = {
            "tp": rank % degree["tp"],
            "etp": rank % degree["etp"],
            "ep": rank // degree["etp"] % degree["ep"],
        }
        for name, value in (item for chunk in chunks for item in chunk.items()):
            where = [slice(None)] * value.ndim
            cuts = next((axes for suffix, axes in CUTS.items() if name.endswith(suffix)), {})
            for kind, axis in cuts.items():
                width = whole[name].shape[axis] // degree[kind]
                where[axis] = slice(part[kind] * width, (part[kind] + 1) * width)
            assert np.array_equal(value, whole[name][tuple(where)]), (rank, name)
            covered[name][tuple(where)] = True
    assert all(mask.all() for mask in covered.values())
