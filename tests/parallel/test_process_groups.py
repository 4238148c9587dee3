"""Starting a rank: process groups, the first message through each, device and seeds."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel import process_groups as runtimes
from parallel.env import World
from parallel.layout import Layout
from parallel.process_groups import Groups
from tests.parallel.helpers import Variant, build_engine, started, train


def members(world: World, degrees: dict) -> tuple[dict[str, list[int]], list[str]]:
    """(the ranks of each group, the groups that the first messages went through)."""
    warmed = []
    all_reduce = dist.all_reduce

    def recorded(tensor: torch.Tensor, *args, group: dist.ProcessGroup) -> None:
        warmed.append(group)
        all_reduce(tensor, *args, group=group)

    dist.all_reduce = recorded
    try:
        with started(world, ParallelConfig(**degrees)) as runtime:
            named = {f.name: getattr(runtime.groups, f.name) for f in dataclasses.fields(Groups)}
            groups = {name: group for name, group in named.items() if group is not None}
            ranks = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
            return ranks, [name for name, group in groups.items() if any(group is w for w in warmed)]
    finally:
        dist.all_reduce = all_reduce


def test_dense_grid(ranks):
    """Tensor-parallel ranks are neighbours, then context, then data, then pipeline. Drawn by hand for rank 6 of
    tp2 cp2 pp2: the second stage is 4 5 | 6 7, a row per context rank."""
    every = ranks.run(8, members, {"tp": 2, "cp": 2, "pp": 2, "etp": 2}, timeout=60)
    groups, warmed = every[6]
    assert set(warmed) == set(groups)
    wanted = {"tp": [6, 7], "cp": [4, 6], "pp": [2, 6], "dp": [6], "dp_cp": [4, 6], "tp_cp": [4, 5, 6, 7]}
    wanted |= {"etp": [6, 7], "ep": [6], "edp": [4, 6], "embedding": [2, 6], "world": [*range(8)]}
    wanted |= {"optimizer_dp_cp": [4, 6], "optimizer_edp": [4, 6]}
    assert groups == wanted


def test_expert_grid(ranks):
    """tp2 pp2 ep2, etp1, over 8 ranks: on the second stage, 4 5 6 7, dense layers see dp rows 4 5 | 6 7 and experts
    see expert rows 4 5 | 6 7, whose columns hold the same experts."""
    every = ranks.run(8, members, {"tp": 2, "pp": 2, "ep": 2}, timeout=60)
    groups, warmed = every[5]
    assert set(warmed) == set(groups)
    wanted = {"tp": [4, 5], "cp": [5], "pp": [1, 5], "dp": [5, 7], "dp_cp": [5, 7], "tp_cp": [4, 5]}
    wanted |= {"etp": [5], "ep": [4, 5], "edp": [5, 7], "embedding": [1, 5], "world": [*range(8)]}
    wanted |= {"optimizer_dp_cp": [5, 7], "optimizer_edp": [5, 7]}
    assert groups == wanted


def test_the_stages_between_hold_no_embedding(ranks):
    every = ranks.run(4, members, {"pp": 4}, timeout=60)
    held = [groups.get("embedding") for groups, _ in every]
    assert held == [[0, 3], None, None, [0, 3]]
    assert all(set(warmed) == set(groups) for groups, warmed in every)


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
