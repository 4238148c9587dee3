"""Initial weights: their distribution, and that they do not depend on how the model is cut."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conf.schema import ModelConfig, MoeConfig, ParallelConfig
from models import init
from models.decoder import ModelChunk
from parallel import process_groups as runtimes
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from parallel.sharding import set_sharding
from tests.moe.helpers import build_context, tiny, whole_model


def values_of(stage: ModelChunk) -> dict[str, np.ndarray]:
    return {name: parameter.detach().cpu().numpy() for name, parameter in stage.named_parameters()}


@pytest.mark.parametrize("router_scale", [None, 1e-3])
def test_weights_follow_the_truncated_normal_of_switch(runtime: Runtime, router_scale: float | None) -> None:
    """Switch, section 2.4: normal with standard deviation sqrt(s / fan_in), values past two of them drawn again (its
    code is tf.truncated_normal_initializer, which does not make up for the tails that are lost). So by the normal
    density phi, the values' own deviation is sqrt(1 - 4 phi(2) / P(|z| < 2)) = 0.880 of it, and 71.5 % lie within
    one."""
    hidden, ffn, s = 64, 96, 0.1
    moe = MoeConfig(num_experts=8, every=2, router_init_scale=router_scale)
    model = tiny(moe, hidden_size=hidden, ffn_hidden_size=ffn, vocab_size=256, init_scale=s)
    within_two = math.erf(2**0.5)
    shrunk = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / within_two)
    for name, value in values_of(whole_model(model, runtime)).items():
        if "norm" in name:
            assert (value == 1).all()
            continue
        scale = router_scale if router_scale and "router" in name else s
        sigma = math.sqrt(scale / (ffn if name.endswith(("down.weight", "w_out")) else hidden))
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


class Shard(NamedTuple):
    """A process group, as far as a sharding asks: rank `index` of `count`."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def whole_draw(seed: int, key: tuple, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """A logical parameter in one piece: the inverse of the truncated normal's distribution function, of numbers that
    the generator of its name draws one after another."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    share = math.erf(2 / math.sqrt(2))
    x = torch.empty(shape).uniform_(-share, share, generator=source)
    return x.erfinv_().mul_(std * math.sqrt(2)).clamp_(-2 * std, 2 * std)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_shard_is_that_of_the_whole_draw(data: st.DataObject) -> None:
    """Bit for bit, for any sharding of any parameter, whatever is drawn at a time; and never more than that."""
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    local = [data.draw(st.integers(1, 4)) for _ in counts]
    per_expert = len(counts) > 1 and data.draw(st.booleans())
    shards = [Shard(data.draw(st.integers(0, n - 1)), n) for n in counts]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    at_once = data.draw(st.integers(1, 40))
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(local, dtype=dtype))
    set_sharding(
        module.weight, *((dim, s) for dim, s in enumerate(shards) if s.count > 1), std=0.3, per_expert=per_expert
    )

    shape = tuple(n * s.count for n, s in zip(local, shards, strict=True))
    if per_expert:
        whole = torch.stack([whole_draw(5, ("weight", expert), shape[1:], 0.3) for expert in range(shape[0])])
    else:
        whole = whole_draw(5, ("weight",), shape, 0.3)
    wanted = whole[tuple(slice(s.index * n, (s.index + 1) * n) for n, s in zip(local, shards, strict=True))]

    drawn, uniform = [], init._uniform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "CHUNK", at_once)
        patch.setattr(init, "_uniform", lambda x, source: drawn.append(x.numel()) or uniform(x, source))
        init.initialise(module, 5)
    assert torch.equal(module.weight.detach(), wanted.to(dtype))
    row = math.prod(shape[2 if per_expert else 1 :])
    assert max(drawn) <= max(at_once, row)


def peak_of_drawing(world: World, rows: int) -> float:
    """MiB that the process holds at most while a rank draws its part of a large parameter, beside the part."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(rows // 8, 1024))
    set_sharding(module.weight, (0, Shard(7, 8)), std=0.1)
    torch.ones(init.CHUNK).erfinv_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    status = lambda name: int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024  # noqa: E731
    before = status("VmRSS:")
    init.initialise(module, 1)
    return status("VmHWM:") - before


def test_a_rank_never_holds_a_whole_parameter(ranks: RankPool) -> None:
    """Of 128 MiB, of which a rank has an eighth."""
    assert ranks.run(1, peak_of_drawing, 32 * 1024, timeout=60)[0] < 32
