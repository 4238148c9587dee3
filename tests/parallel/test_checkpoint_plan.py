"""What passes between ranks when a checkpoint is saved and loaded, beside its tensors: counted."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel import checkpoint_plan, optimizer_state, progress_sync
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_format import TensorFile
from parallel.checkpoint_plan import writers_of, writing_ranks
from parallel.env import World
from parallel.layout import Layout
from tests.parallel.helpers import (
    OPTIM,
    Variant,
    build_engine,
    micro_batch,
    optimizer_tensors,
    started,
    state,
    train,
)

VARIANT = Variant({"num_layers": 2}, {"bias_update_rate": 0.01})


@contextmanager
def counted(received: list[int]) -> Iterator[None]:
    """Appends to a list the bytes of each collective that this rank receives, other than of tensors in floating
    point."""
    originals = {name: getattr(dist, name) for name in ("gather_object", "all_gather_object", "broadcast_object_list")}
    originals |= {name: getattr(dist, name) for name in ("all_reduce", "reduce", "broadcast")}

    def of_objects(name: str, index: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = originals[name](*args, **kwargs)
            received.append(sum(len(pickle.dumps(part)) for part in args[index] or ()))
            return result

        return call

    def of_tensors(name: str) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            received.append(0 if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor.nbytes)
            return originals[name](tensor, *args, **kwargs)

        return call

    places = {"gather_object": 1, "all_gather_object": 0, "broadcast_object_list": 0}
    for name in originals:
        setattr(dist, name, of_objects(name, places[name]) if name in places else of_tensors(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def metadata_bytes(world: World, parallel: ParallelConfig, root: Path) -> dict[str, int]:
    """Rank function: what this rank receives in the first save, in the second, and in a resume."""
    found: dict[str, int] = {}
    writers, checkpoint_plan.WRITERS = checkpoint_plan.WRITERS, 2
    progress_sync.SECONDS = 60.0  # so that ranks meet once, however slow they are
    try:
        with started(world, parallel) as runtime:
            engine = build_engine(runtime, VARIANT)
            saver = Checkpointer(root, engine, keep=9)
            batches = [micro_batch(world.rank)]
            engine.update(OPTIM.lr, loss=engine.forward_backward(batches, step=1).item())
            for name, action in {
                "first": lambda: saver.save(state(1, world.size)),
                "second": lambda: saver.save(state(2, world.size, updates=1)),
                "resume": lambda: saver.resume(pytest.fail),
            }.items():
                received: list[int] = []
                with counted(received):
                    action()
                found[name] = sum(received)
    finally:
        checkpoint_plan.WRITERS, progress_sync.SECONDS = writers, 1.0
    return found


def test_metadata_do_not_grow_with_the_replicas(ranks, tmp_path):
    """The bytes that any rank receives are the same with 2, 4 and 8 data-parallel ranks; only digits of a world's size
    may differ. With tensor parallelism there are more shards to describe."""
    most = {}
    for size in (2, 4, 8):
        told = ranks.run(size, metadata_bytes, ParallelConfig(), tmp_path / str(size), timeout=60)
        most[size] = {name: max(rank[name] for rank in told) for name in told[0]}
    for name in ("first", "second", "resume"):
        assert max(m[name] for m in most.values()) - min(m[name] for m in most.values()) < 64, (name, most)
    sharded = ranks.run(4, metadata_bytes, ParallelConfig(tp=2), tmp_path / "tp", timeout=60)
    most["tp"] = {name: max(rank[name] for rank in sharded) for name in sharded[0]}
    assert most["tp"]["second"] < 1000 < most["tp"]["first"] < 100_000, most  # the plan is not made again


@pytest.mark.parametrize(("size", "writers"), [(1, 8), (5, 8), (8, 8), (64, 8), (100, 8), (2048, 31)])
def test_writers_are_spread_over_the_replicas(size, writers):
    chosen = writing_ranks(size, writers)
    assert len(set(chosen)) == len(chosen) == min(size, writers) and chosen[0] == 0 and max(chosen) < size
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], size], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_files_do_not_grow_with_the_replicas():
    """tp2 pp2 ep4 over up to 16,384 ranks: at most 8 files for each of the 4 shards of a dense parameter and the 8 of
    an expert's."""
    counts = {world: len(writers_of(Layout(world, tp=2, pp=2, ep=4), 8)) for world in (256, 2048, 16_384)}
    assert len(set(counts.values())) == 1 and counts[256] <= 8 * 4 + 8 * 8 * 2
    assert writers_of(Layout(4), 8) == (0, 1, 2, 3)


def plan_differently(world: World) -> None:
    """The second replica believes that another rank writes a parameter."""
    made = optimizer_state.writing_ranks
    if world.rank == 1:
        optimizer_state.writing_ranks = lambda size, writers: made(size, writers)[::-1]
    try:
        with started(world, ParallelConfig()) as runtime:
            engine = build_engine(runtime, VARIANT)
            with pytest.raises(AssertionError, match="plan different checkpoints"):
                optimizer_state.save_plan(engine)
    finally:
        optimizer_state.writing_ranks = made


def test_replicas_have_to_plan_the_same(ranks):
    ranks.run(2, plan_differently, timeout=60)


def bytes_read(world: World, parallel: ParallelConfig, root: Path) -> tuple[int, dict[str, Any]]:
    """(bytes that this rank reads from files in a resume, the optimizer's tensors)."""
    fill, total = TensorFile._fill, 0

    def count(self: TensorFile, start: int, view: memoryview) -> None:
        nonlocal total
        total += len(view)
        fill(self, start, view)

    TensorFile._fill = count
    try:
        with started(world, parallel) as runtime:
            engine = build_engine(runtime, VARIANT)
            assert Checkpointer(root, engine, keep=1).resume(pytest.fail)
            return total, optimizer_tensors(engine)
    finally:
        TensorFile._fill = fill


def save_one(world: World, parallel: ParallelConfig, root: Path) -> dict[str, Any]:
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, VARIANT)
        train(engine, range(1))
        Checkpointer(root, engine, keep=1).save(state(1, world.size))
        return optimizer_tensors(engine)


@pytest.mark.parametrize("degrees", [{}, {"ep": 2}], ids=["dp4", "ep2 dp4"])
def test_everything_is_read_once(ranks, tmp_path, degrees):
    """By all ranks together, apart from headers; with the hashing of what is read."""
    saved = ranks.run(4, save_one, ParallelConfig(**degrees), tmp_path, timeout=60)[0]
    files = [path for path in (tmp_path / "step_00000001").iterdir() if path.suffix == ".safetensors"]
    size, headers = sum(path.stat().st_size for path in files), 0
    for path in files:
        with TensorFile(path) as file:
            headers += file._start
    told = ranks.run(4, bytes_read, ParallelConfig(**degrees), tmp_path, timeout=60)
    total = sum(count for count, _ in told)
    assert size - headers < total < size + 20 * headers
    for kind, tensors in told[0][1].items():
        assert all(torch.equal(tensor, saved[kind][name]) for name, tensor in tensors.items())
