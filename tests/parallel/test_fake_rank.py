"""One rank of a world of thousands: its groups, and that what the ranks hold adds up to the model."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from conf.schema import ModelConfig, MoeConfig, ParallelConfig
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import fake_rank
from parallel.sharding import logical_name
from training.flops import model_cost

LARGE = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 64, "num_query_groups": 8}
LARGE |= {"ffn_hidden_size": 2048, "vocab_size": 131072}
SMALL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "vocab_size": 64}


def parts_of_rank(layout: Layout, rank: int, model: ModelConfig) -> dict[str, tuple]:
    """(offset and size along every axis, elements of the logical parameter) of everything that a rank holds."""
    from models.decoder import ModelBuildContext, ModelChunk
    from models.megatron_config import transformer_config

    held = {}
    with fake_rank(layout, rank) as runtime:
        core = transformer_config(model, runtime, torch.bfloat16, deterministic=False)
        context = ModelBuildContext(model, core, runtime, seed=1)
        for chunk in range(layout.vpp):
            stage = ModelChunk(context, chunk=chunk, sequence_length=64, document_mask=False)
            for name, p in stage.named_parameters():
                assert p.is_meta
                logical = p.sharding.logical_shape(p.shape)
                box = tuple((n * p.sharding.shard_index_and_count(axis)[0], n) for axis, n in enumerate(p.shape))
                held[logical_name(name, p)] = box, math.prod(logical)
    return held


def count_all(world: World, layout: Layout, model: ModelConfig, ranks: list[int]) -> tuple[int, int]:
    """(elements of all distinct boxes, elements of all logical parameters) over some ranks of a layout."""
    boxes: dict[tuple, int] = {}
    wholes: dict[str, int] = {}
    for rank in ranks:
        for name, (box, whole) in parts_of_rank(layout, rank, model).items():
            boxes[name, box] = math.prod(size for _, size in box)
            assert wholes.setdefault(name, whole) == whole
    assert not dist.is_initialized()
    return sum(boxes.values()), sum(wholes.values())


def model_of(sizes: dict, experts: int, **settings) -> ModelConfig:
    return ModelConfig(**{**sizes, **settings}, moe=MoeConfig(num_experts=experts, every=2))


@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_of_a_small_world_adds_up(ranks, tied):
    parallel = ParallelConfig(tp=2, pp=2, ep=2, etp=2, sequence_parallel=True, pp_layers=[1, 3])
    layout, model = Layout.of(parallel, 16), model_of(SMALL, 8, tie_embeddings=tied)
    pieces, wholes = ranks.run(1, count_all, layout, model, [*range(16)], timeout=60)[0]
    assert pieces == wholes == model_cost(model, 64).total
    missing = ranks.run(1, count_all, layout, model, [*range(0, 16, 2)], timeout=60)[0][0]
    assert missing < wholes  # every second rank is one of two tensor-parallel ranks


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1024, tp=8, pp=8, vpp=2, ep=16, sequence_parallel=True),
        Layout(16384, tp=8, pp=16, cp=2, ep=64, etp=2, sequence_parallel=True),
    ],
    ids=lambda layout: str(layout.world),
)
def test_a_world_of_thousands_adds_up(ranks, layout):
    """The ranks of one data-parallel replica of every stage; the rest of the world repeats them."""
    model = model_of(LARGE, 256)
    per_stage = layout.world // layout.pp
    first = range(max(layout.tp, layout.etp * layout.ep))
    chosen = [stage * per_stage + r for stage, r in itertools.product(range(layout.pp), (first[0], first[-1]))]
    _, wholes = ranks.run(1, count_all, layout, model, chosen, timeout=60)[0]
    assert wholes == model_cost(model, 64).total
    # One stage, rank by rank: its boxes are all of what the stage holds.
    pieces, wholes = ranks.run(1, count_all, layout, model, list(first), timeout=60)[0]
    assert pieces == wholes


def group_sizes(world: World, layout: Layout, rank: int) -> dict[str, tuple[int, int]]:
    with fake_rank(layout, rank) as runtime:
        names = ("tp", "cp", "pp", "dp", "ep", "etp", "edp", "dp_cp", "tp_cp", "world")
        return {name: (getattr(runtime.groups, name).rank(), getattr(runtime.groups, name).size()) for name in names}


def test_a_planned_rank_knows_its_place(ranks):
    layout = Layout(16384, tp=8, pp=16, cp=2, ep=64, etp=2)
    got = ranks.run(1, group_sizes, layout, 5000, timeout=60)[0]
    # By hand: 5000 = 4 * 1024 + 904; 904 = 0 + 8 * (1 + 2 * 56); 904 = 0 + 2 * (4 + 64 * 7).
    wanted = {"tp": (0, 8), "cp": (1, 2), "dp": (56, 64), "pp": (4, 16), "etp": (0, 2), "ep": (4, 64), "edp": (7, 8)}
    wanted |= {"dp_cp": (113, 128), "tp_cp": (8, 16), "world": (5000, 16384)}
    assert got == wanted
