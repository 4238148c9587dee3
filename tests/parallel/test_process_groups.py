"""Starting a rank: process groups, the first message through each, device and seeds."""

import random
import sys
import time
from traceback import walk_stack
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel import process_groups as runtimes
from parallel.env import World
from parallel.flight_recorder import format_ranks
from parallel.layout import Layout
from parallel.local_launcher import fake_rank
from parallel.megatron_groups import set_parallel_state
from parallel.process_groups import AXES, build_groups
from parallel.torch_private import fake_store, ranks_of_groups
from parallel.watchdog import rank_status
from tests.parallel.helpers import Variant, build_engine, started, train


class Members(NamedTuple):
    """What a rank has made of its groups."""

    ranks: dict[str, list[int]]
    """Of each kind of group."""
    warmed: set[str]
    """The kinds that the first messages went through."""
    made: int
    """Number of groups."""
    same: set[tuple[str, ...]]
    """The kinds that are one group."""


def members(world: World, degrees: dict) -> Members:
    """The groups of a rank of a real world, whose ranks take a different time each between making one and the next."""
    warmed, all_reduce, new_group, late = [], dist.all_reduce, dist.new_group, random.Random(world.rank)

    def recorded(tensor: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool) -> Any:
        warmed.append(group)
        return all_reduce(tensor, group=group, async_op=async_op)

    def delayed(*args, **named) -> Any:
        time.sleep(late.random() / 20)
        return new_group(*args, **named)

    dist.all_reduce, dist.new_group = recorded, delayed
    try:
        with started(world, ParallelConfig(**degrees)) as runtime:
            groups = dict(runtime.groups.named())
            same: dict[dist.ProcessGroup, tuple[str, ...]] = {}
            for name, group in groups.items():
                same[group] = (*same.get(group, ()), name)
            assert len(warmed) == len(set(warmed))
            return Members(
                {name: dist.get_process_group_ranks(group) for name, group in groups.items()},
                {name for name, group in groups.items() if group in warmed},
                len(ranks_of_groups()),
                set(same.values()),
            )
    finally:
        dist.all_reduce, dist.new_group = all_reduce, new_group


def several(ranks: dict[str, list[int]]) -> set[str]:
    return {name for name, of in ranks.items() if len(of) > 1}


def test_dense_grid(ranks):
    """Tensor-parallel ranks are neighbours, then context, then data, then pipeline. Drawn by hand for rank 6 of
    tp2 cp2 pp2: the second stage is 4 5 | 6 7, a row per context rank."""
    rank = ranks.run(8, members, {"tp": 2, "cp": 2, "pp": 2, "etp": 2}, timeout=60)[6]
    wanted = {"tp": [6, 7], "cp": [4, 6], "pp": [2, 6], "dp": [6], "dp_cp": [4, 6], "tp_cp": [4, 5, 6, 7]}
    wanted |= {"etp": [6, 7], "ep": [6], "edp": [4, 6], "embedding": [2, 6], "world": [*range(8)]}
    wanted |= {"optimizer_dp_cp": [4, 6], "optimizer_edp": [4, 6]}
    assert rank.ranks == wanted and rank.warmed == several(wanted)
    # Of the same ranks, but not one group: tp and etp, cp and the data-parallel groups, dp_cp and edp.
    assert rank.same == {
        *(("tp",), ("cp",), ("dp_cp", "optimizer_dp_cp"), ("tp_cp",), ("etp",), ("edp", "optimizer_edp"), ("world",)),
        *(("pp", "embedding"), ("dp", "ep")),
    }
    assert rank.made == 9


def test_expert_grid(ranks):
    """tp2 pp2 ep2, etp1, over 8 ranks: on the second stage, 4 5 6 7, dense layers see dp rows 4 5 | 6 7 and experts
    see expert rows 4 5 | 6 7, whose columns hold the same experts."""
    rank = ranks.run(8, members, {"tp": 2, "pp": 2, "ep": 2}, timeout=60)[5]
    wanted = {"tp": [4, 5], "cp": [5], "pp": [1, 5], "dp": [5, 7], "dp_cp": [5, 7], "tp_cp": [4, 5]}
    wanted |= {"etp": [5], "ep": [4, 5], "edp": [5, 7], "embedding": [1, 5], "world": [*range(8)]}
    wanted |= {"optimizer_dp_cp": [5, 7], "optimizer_edp": [5, 7]}
    assert rank.ranks == wanted and rank.warmed == several(wanted)
    shared = {("dp", "dp_cp", "optimizer_dp_cp"), ("tp", "tp_cp"), ("pp", "embedding"), ("cp", "etp")}
    assert rank.same == {*shared, ("ep",), ("edp", "optimizer_edp"), ("world",)}
    assert rank.made == 7


def test_the_stages_between_hold_no_embedding(ranks):
    every = ranks.run(8, members, {"pp": 4, "tp": 2}, timeout=60)
    held = [rank.ranks.get("embedding") for rank in every]
    assert held == [[0, 6], [1, 7], None, None, None, None, [0, 6], [1, 7]]
    assert all(rank.warmed == several(rank.ranks) for rank in every)


# How Megatron-Core names the groups of a rank.
GETTERS = {
    "tp": ("get_tensor_model_parallel_group", {}),
    "pp": ("get_pipeline_model_parallel_group", {}),
    "cp": ("get_context_parallel_group", {}),
    "dp": ("get_data_parallel_group", {}),
    "dp_cp": ("get_data_parallel_group", {"with_context_parallel": True}),
    "intra_dp_cp": ("get_data_parallel_group", {"with_context_parallel": True, "partial_data_parallel": True}),
    "tp_cp": ("get_tensor_and_context_parallel_group", {}),
    "ep": ("get_expert_model_parallel_group", {}),
    "etp": ("get_expert_tensor_parallel_group", {}),
    "edp": ("get_expert_data_parallel_group", {}),
    "intra_edp": ("get_expert_data_parallel_group", {"partial_expert_data_parallel": True}),
    "embedding": ("get_embedding_group", {"check_initialized": False}),
    "intra_dist_opt": ("get_intra_distributed_optimizer_instance_group", {}),
}
UNUSED = {
    "mp": ("get_model_parallel_group", {"check_initialized": False}),
    "position_embedding": ("get_position_embedding_group", {"check_initialized": False}),
    "tp_ep": ("get_expert_tensor_and_model_parallel_group", {"check_initialized": False}),
    "tp_ep_pp": ("get_expert_tensor_model_pipeline_parallel_group", {"check_initialized": False}),
}


def parallel_state_of(layout: Layout, rank: int, *, megatrons: bool) -> dict[str, Any]:
    """What Megatron-Core's globals say on one rank of a world without peers: the ranks of its groups, and their number.

    Args:
        megatrons: whether Megatron-Core makes the groups.
    """
    from megatron.core import parallel_state as ps

    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=layout.world)
    try:
        if megatrons:
            degrees = {name: getattr(layout, name) for name in ("tp", "pp", "cp")}
            names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context"}
            ps.initialize_model_parallel(
                **{f"{names[name]}_parallel_size": n for name, n in degrees.items()},
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                create_gloo_process_groups=False,
            )
        else:
            groups = build_groups(layout, rank, embedding=True)
            set_parallel_state(groups, layout)
            for name, group in groups.named():
                if name in AXES:
                    assert dist.get_process_group_ranks(group) == layout.group(rank, *AXES[name]), name
        found = {name: getattr(ps, getter)(**options) for name, (getter, options) in (GETTERS | UNUSED).items()}
        told: dict[str, Any] = {name: group and dist.get_process_group_ranks(group) for name, group in found.items()}
        for name in dir(ps):  # the lists of ranks, and sizes that are set for each rank
            if "_RANKS" in name or name.startswith(("_VIRTUAL", "_MPU")):
                told[name] = getattr(ps, name)
        return told | {"ranks": ps.get_all_ranks(), "made": len(ranks_of_groups())}
    finally:
        ps.destroy_model_parallel()
        ps._EMBEDDING_GLOBAL_RANKS = None  # which it forgets
        dist.destroy_process_group()


def random_layouts(count: int) -> list[tuple[Layout, int]]:
    """(layout, one of its ranks)"""
    draw, found = random.Random(7), []
    for _ in range(count):
        tp, cp, dp, pp, etp = (draw.choice([1, 2, 3, 4]) for _ in range(5))
        world = tp * cp * dp * pp * etp
        rest = world // (etp * pp)
        ep = draw.choice([n for n in range(1, rest + 1) if rest % n == 0])
        layout = Layout(world, tp=tp, cp=cp, pp=pp, vpp=draw.choice([1, 2]) if pp > 1 else 1, ep=ep, etp=etp)
        found.append((layout, draw.randrange(world)))
    return found


def compare_with_megatron(world: World) -> list[int]:
    told = []
    for layout, rank in [(Layout(1), 0), (Layout(12, pp=3, tp=4), 5), *random_layouts(24)]:
        theirs = parallel_state_of(layout, rank, megatrons=True)
        ours = parallel_state_of(layout, rank, megatrons=False)
        told.append(ours.pop("made"))
        assert told[-1] <= theirs.pop("made"), layout
        for name in UNUSED if layout.world > 1 else ():
            assert ours.pop(name) is None, name
            theirs.pop(name)
        for name in ("_MODEL_PARALLEL_GLOBAL_RANKS", "_POSITION_EMBEDDING_GLOBAL_RANKS"):
            theirs.pop(name, None), ours.pop(name, None)
        assert ours == theirs, (layout, rank)
    return told


def test_groups_and_globals_are_megatrons(ranks):
    """Of random ranks under random layouts, as Megatron-Core's own initialization sets them."""
    made = ranks.run(1, compare_with_megatron, timeout=120)[0]
    assert made[0] == 1 and max(made) <= 12


def groups_made(world: World, layout: Layout) -> int:
    with fake_rank(layout, 0):
        return len(ranks_of_groups())


def test_a_rank_makes_as_many_groups_in_any_world(ranks):
    """Megatron-Core makes 4,313 at 1,024 ranks."""
    layouts = [Layout(world, tp=2, pp=4, ep=8) for world in (64, 1024, 16384)]
    assert [ranks.run(1, groups_made, layout, timeout=60)[0] for layout in layouts] == [8, 8, 8]


class Message:
    """An all-reduce that has started."""

    def __init__(self, order: list[str], group: dist.ProcessGroup, one: torch.Tensor, broken: list[int]) -> None:
        self.ranks, self.order, self.one = dist.get_process_group_ranks(group), order, one
        self.broken = broken
        order.append("start")

    def wait(self) -> None:
        self.order.append("wait")
        waits = rank_status(0, [frame for frame, _ in walk_stack(sys._getframe(1))]).collective
        assert waits == f"the first message over {format_ranks(self.ranks)}"  # the watchdog's words
        if self.ranks == self.broken:
            raise RuntimeError("Connection closed by peer")
        self.one.fill_(len(self.ranks))


def first_messages(world: World, broken: list[int]) -> tuple[list[str], str]:
    """(order of starts and waits, error) of rank 5 of 16: tp2, dp4 and pp2, of which groups have the ranks 4 5, 1 3 5
    7 and 5 13."""
    order: list[str] = []
    all_reduce = dist.all_reduce
    with fake_rank(Layout(16, tp=2, pp=2, ep=4), 5) as runtime:
        dist.all_reduce = lambda one, group, async_op: Message(order, group, one, broken)
        try:
            runtimes._warm_up(runtime.groups, torch.device("cpu"))
        except RuntimeError as error:
            return order, str(error)
        finally:
            dist.all_reduce = all_reduce
    return order, ""


def test_the_first_messages_are_under_way_together(ranks):
    order, error = ranks.run(1, first_messages, [], timeout=30)[0]
    assert order == ["start"] * 6 + ["wait"] * 6 and not error  # tp, dp, pp, ep, edp, world


def test_a_broken_group_is_named(ranks):
    _, error = ranks.run(1, first_messages, [1, 3, 5, 7], timeout=30)[0]
    kinds = "dp/dp_cp/optimizer_dp_cp (ranks 1, 3, 5, 7)"
    assert error.startswith(f"the first message through the process group {kinds} failed: Connection closed")


def untied(world: World, embedding: bool) -> tuple[bool, list]:
    runtime = runtimes.start(world, Layout(4, pp=4), seed=1, timeout=60, threads=1, embedding=embedding)
    try:
        model = {"tie_embeddings": False}
        return runtime.groups.embedding is None, train(build_engine(runtime, Variant(model=model)), range(1))
    finally:
        runtimes.stop()


def test_a_model_whose_stages_share_nothing_needs_no_embedding_group(ranks):
    with_group, without = (ranks.run(4, untied, embedding, timeout=90) for embedding in (True, False))
    assert [none for none, _ in with_group] == [False, True, True, False]
    assert all(none for none, _ in without)
    assert [losses for _, losses in with_group] == [losses for _, losses in without]


def lives(world: World) -> list:
    """Three starts of one process: the first and the last alike, the second with another seed."""
    told = []
    for seed in (5, 6, 5):
        runtime = runtimes.start(World(), Layout(1), seed=seed, timeout=60, threads=2)
        trained = train(build_engine(runtime, Variant()), range(1))
        told.append((random.random(), np.random.rand(), torch.rand(()).item(), torch.get_num_threads(), trained))
        runtimes.stop()
        assert not dist.is_initialized()
    torch.set_num_threads(1)
    return told


def test_a_process_can_start_again(ranks):
    first, other_seed, second = ranks.run(1, lives, timeout=60)[0]
    assert first == second
    assert all(a != b for a, b in zip(first[:3], other_seed[:3], strict=True))
    assert first[3] == 2
    assert first[4] == other_seed[4]  # the model draws nothing from these generators


def test_one_rank_needs_one_gpu_unless_it_is_simulated(monkeypatch):
    started, simulated = World(2, 3, 2, 3), World(2, 3, 2, 3, simulated=True)
    if not torch.cuda.is_available():
        assert runtimes.pick_device(simulated) == (torch.device("cpu"), "gloo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert runtimes.pick_device(simulated) == runtimes.pick_device(started) == (torch.device("cuda", 2), "nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtimes.pick_device(simulated) == (torch.device("cuda", 0), "staged")
    with pytest.raises(ValueError, match=r"3 ranks on this machine but 2 GPU.*NPROC=3"):
        runtimes.pick_device(started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")  # each task sees its own alone, as the first
    assert runtimes.pick_device(World(5, 8, 5, 8)) == (torch.device("cuda", 0), "nccl")
