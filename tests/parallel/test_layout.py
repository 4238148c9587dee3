"""Degrees of parallelism over a world: grids against Megatron-Core's own, nodes against grids drawn by hand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import rules
from conf.schema import Config, ModelConfig, MoeConfig, ParallelConfig, TrainConfig
from parallel.layout import GRIDS, Layout, describe, groups_across_nodes


@pytest.mark.parametrize(
    "world, degrees, dp, edp, told",
    [
        (1, {}, 1, 1, "one rank"),
        (8, {}, 8, 8, "dp8"),
        (16, {"tp": 2, "cp": 2, "pp": 2, "vpp": 2, "ep": 4}, 2, 2, "dp2 tp2 pp2 vpp2 cp2 ep4"),
        (8, {"tp": 4, "sequence_parallel": True, "ep": 2, "etp": 4}, 2, 1, "dp2 tp4 ep2 etp4 +sequence"),
        (2, {"pp": 2, "pp_layers": [3, 5]}, 1, 1, "pp2 (layers 3+5)"),
        (32, {"pp": 32, "vpp": 3, "pp_layout": "E|(t|)*94L"}, 1, 1, "pp32 vpp3 (layers 0+1*94+0)"),
    ],
)
def test_both_grids_fill_the_world(world, degrees, dp, edp, told):
    layout = Layout.of(ParallelConfig(**degrees), world)
    assert (layout.dp, layout.edp, layout.describe()) == (dp, edp, told)


@pytest.mark.parametrize("degrees", [{"tp": 3}, {"pp": 2, "cp": 4}, {"ep": 3}, {"etp": 8}])
def test_a_grid_that_does_not_fill_the_world_is_a_bug(degrees):
    with pytest.raises(AssertionError):
        Layout.of(ParallelConfig(**degrees), 4)


@settings(max_examples=60, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), etp=st.integers(1, 3), data=st.data())
def test_groups_are_megatrons(sizes, etp, data):
    """Every group of every kind, under any sizes that fill the world, as Megatron-Core's generator makes them."""
    from megatron.core.parallel_state import RankGenerator

    tp, cp, dp, pp = sizes
    world = tp * cp * dp * pp * etp  # so that etp fits
    rest = world // (etp * pp)
    ep = data.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    layout = Layout(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    attention = RankGenerator(tp=tp, ep=1, dp=layout.dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    experts = RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    asked = [(attention, kind, kind.split("-")) for kind in ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp")]
    asked += [(experts, "tp", ["etp"]), (experts, "ep", ["ep"]), (experts, "dp", ["edp"]), (experts, "tp-ep-pp", None)]
    for generator, kind, axes in asked:
        axes = axes or ["etp", "ep", "pp"]
        wanted = generator.get_ranks(kind)
        assert {tuple(layout.group(rank, *axes)) for rank in range(world)} == {tuple(g) for g in wanted}, kind
        if len(axes) == 1:
            for members in wanted:
                assert [layout.coordinates(rank)[axes[0]] for rank in members] == list(range(len(members)))


def test_layers_of_chunks():
    """By hand: two stages of two chunks; stage 0 holds chunks 0 and 2."""
    even, uneven = Layout(2, pp=2, vpp=2), Layout(2, pp=2, vpp=2, pp_layers=(1, 3, 2, 2))
    assert [list(even.chunk_layers(c, 8)) for c in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(uneven.chunk_layers(c, 8)) for c in range(4)] == [[0], [1, 2, 3], [4, 5], [6, 7]]
    with pytest.raises(AssertionError):
        uneven.chunk_layers(0, 9)


def test_nodes_by_hand():
    """tp4 pp2 ep4 on nodes of four: 0-3 | 4-7 | 8-11 | 12-15. Tensor and expert groups are nodes; on nodes of two or
    six they are not."""
    layout = Layout(16, tp=4, pp=2, ep=4)
    assert {axis: layout.nodes_of(axis, 4) for axis in ("tp", "ep", "dp", "pp")} == {"tp": 1, "ep": 1, "dp": 2, "pp": 2}
    assert groups_across_nodes(layout, 4) == [] == groups_across_nodes(layout, 16)
    assert layout.nodes_of("tp", 2) == 2 and layout.nodes_of("tp", 6) == 2  # 0-5 | 6-11: 4-7 is on both
    told = groups_across_nodes(layout, 6)
    assert len(told) == 2 and told[0].startswith("a tp group lies within 4 consecutive ranks, a node has 6: it spans 2")
    # Context ranks are tp apart: with tp4 a pair of them never fits into a node of four.
    assert [text[:10] for text in groups_across_nodes(Layout(16, tp=4, cp=2), 4)] == ["a cp group"]


def test_description_by_hand():
    wanted = """\
8 ranks on 2 nodes of 4: dp2 tp2 pp2 ep4
attention  tp 2 * cp 1 * dp 2 * pp 2 = 8
experts    etp 1 * ep 4 * edp 1 * pp 2 = 8

group   size  groups  nodes  example
tp         2       4      1  0 1
dp         2       4      1  0 2
ep         4       2      1  0 1 2 3
pp         2       4      2  0 4

   rank   node    tp   cp   dp  etp   ep  edp   pp
      0      0     0    0    0    0    0    0    0
      1      0     1    0    0    0    1    0    0
      2      0     0    0    1    0    2    0    0
      3      0     1    0    1    0    3    0    0
      4      1     0    0    0    0    0    0    1
      5      1     1    0    0    0    1    0    1
      6      1     0    0    1    0    2    0    1
      7      1     1    0    1    0    3    0    1"""
    assert describe(Layout(8, tp=2, pp=2, ep=4), 4) == wanted


@pytest.mark.parametrize(
    "world, degrees",
    [
        (1024, {"tp": 8, "pp": 8, "vpp": 2, "ep": 16, "sequence_parallel": True}),
        (16384, {"tp": 8, "pp": 16, "cp": 2, "ep": 64, "etp": 2, "sequence_parallel": True}),
    ],
)
def test_thousands_of_ranks_take_no_time(world, degrees):
    started = time.perf_counter()
    sizes = {"num_layers": 64, "hidden_size": 8192, "num_attention_heads": 64, "num_query_groups": 8}
    model = ModelConfig(**sizes, ffn_hidden_size=2048, vocab_size=131072, moe=MoeConfig(num_experts=256, top_k=8))
    train = TrainConfig(micro_batch_size=1, global_batch_size=world, sequence_length=8192)
    config = Config(model=model, parallel=ParallelConfig(**degrees), train=train)
    rules.check(config, world)
    told = describe(Layout.of(config.parallel, world), 8)
    with pytest.raises(ValueError, match="nearest layouts"):
        config.parallel.tp, config.parallel.pp = 7, 24
        rules.check(config, world)
    assert time.perf_counter() - started < 5
    assert f"{world:,} ranks on {world // 8:,} nodes of 8" in told
    for grid in GRIDS:
        assert next(line for line in told.splitlines() if line.startswith(grid)).endswith(f"= {world:,}")
    assert told.count("\n") < 60 and f"{world - 1:,} " in told  # the rows between are left out
