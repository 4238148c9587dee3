"""Optimizer states that are sharded over a part of the data-parallel ranks and replicated over the rest."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.schema import Config, ModelConfig, MoeConfig, OptimConfig, ParallelConfig
from parallel.distributed_optimizer import Overlap
from parallel.env import World
from parallel.layout import Layout
from parallel.optimizer_state import _optimizer_shards
from tests.conf.test_rules import SPARSE, error_message, view
from tests.parallel.helpers import OPTIM, Variant, build_engine, started, train
from training.memory_estimate import Stage, memory_per_rank, optimizer_bytes

VARIANT = Variant({"num_layers": 2})


def test_groups_by_hand():
    """tp2 dp4 ep2 on 16 ranks in two stages: of ranks 0, 2, 4, 6 with the same dense shard, two instances; of ranks 0,
    2, 4, 6 with the same experts too."""
    layout = Layout(16, tp=2, pp=2, ep=2, optimizer_instances=2)
    assert layout.group(2, "cp", "dp") == [0, 2, 4, 6] == layout.group(2, "edp")
    assert layout.optimizer_group(2, "cp", "dp") == [0, 2] == layout.optimizer_group(2, "edp")
    assert layout.optimizer_group(14, "cp", "dp") == [12, 14]
    assert layout.optimizer_replicas(2) == [2, 6] and layout.optimizer_replicas(9) == [9, 13]
    assert layout.optimizer_ranks == (2, 2)
    # Twice as many ranks of cp; experts over all of them.
    layout = Layout(8, cp=2, ep=4, optimizer_instances=2)
    assert layout.optimizer_group(1, "cp", "dp") == [0, 1, 2, 3] and layout.optimizer_group(1, "edp") == [1]
    assert layout.optimizer_replicas(1) == [1, 5]


def groups_of(world: World, parallel: ParallelConfig) -> list[list[int]]:
    """The ranks of the groups that Megatron-Core's gradient buckets communicate over."""
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, VARIANT)
        of_buckets = [chunk.bucket_groups[0] for chunk in engine.chunks]
        experts = [chunk.expert_parallel_bucket_groups[0] for chunk in engine.chunks]
        groups = [b.intra_distributed_optimizer_instance_group for b in (of_buckets[0], experts[0])]
        groups += [b.inter_distributed_optimizer_instance_group for b in (of_buckets[0], experts[0])]
        return [dist.get_process_group_ranks(group) for group in groups]


@pytest.mark.parametrize("degrees", [{"tp": 2, "etp": 2}, {"ep": 4}, {"cp": 2, "ep": 2}, {"pp": 2, "ep": 2}])
def test_gradients_are_reduced_over_these_groups(ranks, degrees):
    parallel = ParallelConfig(**degrees, optimizer_instances=2)
    layout = Layout.of(parallel, 8)
    for rank, groups in enumerate(ranks.run(8, groups_of, parallel, timeout=60)):
        dense, experts = layout.optimizer_group(rank, "cp", "dp"), layout.optimizer_group(rank, "edp")
        assert groups == [dense, experts, *[layout.optimizer_replicas(rank)] * 2]


def replicas(world: World, optim: OptimConfig) -> tuple[dict[str, tuple[int, int]], dict[str, torch.Tensor], float]:
    """(range of each parameter's shard, its master weights after two steps, the last gradient norm)."""
    with started(world, ParallelConfig(ep=2, optimizer_instances=2)) as runtime:
        engine = build_engine(runtime, VARIANT, optim)
        told = train(engine, range(2))
        names = {p: name for name, p in engine.modules[0].named_parameters()}
        shards = {names[p]: shard for p, shard in _optimizer_shards(engine).items()}
        spans = {name: (shard.start, shard.end) for name, shard in shards.items()}
        return spans, {name: shard.master.detach().clone() for name, shard in shards.items()}, told[-1][1]


SETTINGS: dict[str, dict[str, Any]] = {"adamw": {}, "muon": {"name": "muon"}, "bf16 moments": {"state_dtype": "bf16"}}


@pytest.mark.parametrize("name", SETTINGS)
def test_instances_hold_the_same_bits(ranks, name):
    optim = OptimConfig(lr=OPTIM.lr, eps=OPTIM.eps, **SETTINGS[name])
    told = ranks.run(4, replicas, optim, timeout=60)
    for rank in (0, 1):
        (spans, weights, norm), (other_spans, other_weights, other_norm) = told[rank], told[rank + 2]
        assert spans == other_spans and norm == other_norm
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert told[0][0] != told[1][0]  # sharded over the two ranks of an instance


@pytest.mark.parametrize(
    ("changes", "world", "told", "nearest"),
    [
        (
            {"parallel.optimizer_instances": 3},
            4,
            "data-parallel size % parallel.optimizer_instances == 0, but 4 % 3",
            "=2",
        ),
        (
            {"parallel.optimizer_instances": 4, "parallel.ep": 4, **SPARSE},
            8,
            "data-parallel size of the experts % parallel.optimizer_instances == 0, but 2 % 4 = 2",
            "parallel.optimizer_instances=2",
        ),
    ],
)
def test_instances_divide_the_replicas(changes, world, told, nearest):
    message = error_message(view(changes | {"train.global_batch_size": 32}, world))
    assert told in message and nearest in message
    assert error_message(view({"parallel.optimizer_instances": 2, "train.global_batch_size": 32}, 4)) == ""


def test_overlap_needs_streams():
    instances = ParallelConfig(optimizer_instances=2, overlap_grad_reduce=True)
    with pytest.raises(ValueError, match=r"optimizer_instances=2 needs a GPU.*overlap_grad_reduce=null"):
        Overlap.of(instances, "gloo")
    assert Overlap.of(instances, "nccl").grad_reduce
    assert not Overlap.of(ParallelConfig(optimizer_instances=2), "gloo").grad_reduce


def test_the_memory_estimate_knows_the_instances():
    config = Config(model=ModelConfig(moe=MoeConfig(num_experts=8)))
    stage = Stage(0, 4, 0, True, True)
    one, two = (optimizer_bytes(config, Layout(8, ep=2, optimizer_instances=n), stage, bf16=True) for n in (1, 2))
    assert two == pytest.approx(2 * one)
    layouts = [Layout(8, ep=2, optimizer_instances=n) for n in (1, 2)]
    estimates = [memory_per_rank(config, layout, bf16=True) for layout in layouts]
    assert estimates[1].optimizer == pytest.approx(2 * estimates[0].optimizer)
    assert estimates[1].weights == estimates[0].weights and "optimizer_instances2" in layouts[1].describe()
