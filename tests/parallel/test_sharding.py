"""Cutting a logical parameter: the parts of all ranks tile it."""

import itertools
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parallel.sharding import Sharding, logical_name, set_sharding


@dataclass(frozen=True)
class Group:
    """A process group, as far as a sharding asks: rank `index` of `parts`."""

    index: int
    parts: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.parts


@settings(deadline=None)
@given(parts=st.lists(st.integers(1, 3), min_size=1, max_size=3), local=st.data())
def test_the_parts_of_all_ranks_tile_the_whole(parts, local):
    sizes = [local.draw(st.integers(1, 3)) for _ in parts]
    whole = torch.arange(torch.Size(n * p for n, p in zip(sizes, parts, strict=True)).numel())
    whole = whole.view([n * p for n, p in zip(sizes, parts, strict=True)])
    rebuilt = torch.full_like(whole, -1)
    for ranks in itertools.product(*map(range, parts)):
        sharding = Sharding(tuple((axis, Group(r, p)) for axis, (r, p) in enumerate(zip(ranks, parts, strict=True))))
        mine = whole[tuple(slice(*bounds) for bounds in sharding.bounds(torch.Size(sizes)))]
        assert list(mine.shape) == sizes
        assert sharding.logical_shape(mine.shape) == tuple(whole.shape)
        first, last = mine.numel() // 3, mine.numel()
        index = torch.arange(first, last)
        for inner, skipped, begin in sharding.index_steps(mine.shape):
            index += index // inner * skipped + begin
        assert torch.equal(whole.flatten()[index], mine.flatten()[first:last])
        # The box by index and size, as checkpoints describe it.
        box = rebuilt
        for axis in range(whole.dim()):
            index, pieces = sharding.shard_index_and_count(axis)
            step = whole.shape[axis] // pieces
            box = box.narrow(axis, index * step, step)
        assert (box == -1).all()  # nobody else's
        box.copy_(mine)
    assert torch.equal(rebuilt, whole)


def test_a_cut_by_hand():
    """The rows 2 and 3 and the columns 4 and 5 of a matrix of 4 by 6."""
    sharding = Sharding(((0, Group(1, 2)), (1, Group(2, 3))))
    assert sharding.bounds(torch.Size([2, 2])) == [(2, 4), (4, 6)]
    assert sharding.shard_index_and_count(0) == (1, 2) and sharding.shard_index_and_count(1) == (2, 3)
    assert Sharding(((1, Group(1, 2)),)).shard_index_and_count(0) == (0, 1)


def test_one_copy_speaks_for_all():
    first, second = Group(0, 2), Group(1, 2)
    assert Sharding(replicas=(first, first)).is_first_replica()
    assert not Sharding(replicas=(first, second)).is_first_replica()
    assert not Sharding(alias="embedding.weight").is_first_replica()


def test_place_marks_what_megatron_core_reads():
    cut = set_sharding(nn.Parameter(torch.zeros(4, 2)), (0, Group(0, 2)), (1, Group(0, 2)), std=0.1)
    assert (cut.tensor_model_parallel, cut.partition_dim, cut.partition_stride) == (True, 1, 1)
    # A copied parameter must not count once per rank in the gradient norm.
    assert not hasattr(set_sharding(nn.Parameter(torch.zeros(4)), replicas=(Group(0, 2),)), "tensor_model_parallel")


def test_a_second_copy_has_the_name_of_the_first():
    own, alias = (
        set_sharding(nn.Parameter(torch.zeros(1))),
        set_sharding(nn.Parameter(torch.zeros(1)), alias="embedding.weight"),
    )
    assert logical_name("head.weight", own) == "head.weight"
    assert logical_name("head.weight", alias) == "embedding.weight"
