"""A checkpoint is whole or it is not there."""

import copy
import os
import resource
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ParallelConfig
from parallel import checkpoint, optimizer_state
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_manifest import write_manifest
from parallel.checkpoint_writer import CheckpointWriter
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.parallel import helpers
from tests.parallel.helpers import Variant, build_engine, optimizer_tensors, started, train

state = partial(helpers.state, updates=1)
VARIANT = Variant({"num_layers": 2}, {"bias_update_rate": 0.01})


@pytest.fixture
def engine(runtime):
    engine = build_engine(runtime, VARIANT)
    train(engine, range(1))  # without an update there are no moments to write
    return engine


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(engine, root) -> list[Path]:
    """Two checkpoints, the newest last."""
    saver = Checkpointer(root, engine, keep=2)
    return [saver.save(state(1)), saver.save(state(2))]


def newest(root: Path) -> Path | None:
    return next((path for path in checkpoint.step_directories(root) if checkpoint.find_damage(path) is None), None)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_only_the_newest_are_kept(engine, root):
    saver = Checkpointer(root, engine, keep=2)
    for step in (1, 3, 12, 20):
        assert saver.save(state(step)) == newest(root)
    assert [p.name for p in checkpoint.step_directories(root)] == ["step_00000020", "step_00000012"]
    assert len(list(root.iterdir())) == 2


def test_a_writer_that_dies_leaves_nothing_that_counts(engine, saved, root, monkeypatch):
    saver = Checkpointer(root, engine, keep=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpointer, "_publish", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        saver.save(state(3))
    (leftover,) = root.glob(".writing-*")
    assert newest(root) == saved[1]
    assert saver.save(state(4)) == newest(root)
    assert leftover.exists()  # for all we know its writer is alive
    long_ago = time.time() - 7200
    os.utime(leftover, (long_ago, long_ago))
    saver.save(state(5))
    assert not leftover.exists()


def test_saving_a_step_again_leaves_it_alone(engine, saved, root):
    before = {p: p.stat().st_mtime_ns for p in saved[1].iterdir()}
    train(engine, range(1, 2))
    assert Checkpointer(root, engine, keep=2).save(state(2, updates=2)) == saved[1]
    assert {p: p.stat().st_mtime_ns for p in saved[1].iterdir()} == before
    assert len(list(root.iterdir())) == 2


def test_saving_a_damaged_step_again_mends_it(engine, saved, root):
    truncate(next(saved[1].glob("*.safetensors")))
    assert Checkpointer(root, engine, keep=2).save(state(2)) == newest(root) == saved[1]
    assert (root / "damaged-step_00000002").is_dir()


def test_two_writers_do_no_harm(engine, root, monkeypatch):
    """A job that was requeued while its first life still writes: the second saves the same step, and a later one,
    between the first's writing and its publishing."""
    publish = Checkpointer._publish

    def slow(self: Checkpointer, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(Checkpointer, "_publish", publish)
        other = Checkpointer(root, engine, keep=1)
        other.save(state(1))
        other.save(state(2))
        publish(self, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "_publish", slow)
    Checkpointer(root, engine, keep=2).save(state(1))
    assert newest(root).name == "step_00000002"
    assert [p.name for p in checkpoint.step_directories(root)] == ["step_00000002", "step_00000001"]
    assert all(checkpoint.find_damage(p) is None for p in root.iterdir())


def test_a_step_that_appears_while_it_is_published_is_kept(engine, root, monkeypatch):
    """Two writers within the instant between looking and renaming."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        Checkpointer(root, engine, keep=2).save(state(1))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert Checkpointer(root, engine, keep=2).save(state(1)) == newest(root)
    assert [p.name for p in root.iterdir()] == ["step_00000001"]


def fill_the_disk(world: World, root: Path) -> list[tuple[str, str, str]]:
    """(error, newest then, newest after one more save with room again) of saves during which a rank's disk is full.
    A limit on the size of files stands for the full disk: it fails in the same place, the write."""
    told = []
    with started(world, ParallelConfig()) as runtime:
        engine = build_engine(runtime, VARIANT)
        train(engine, range(1))
        saver = Checkpointer(root, engine, keep=9)
        saver.save(state(1))
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Full at the start; full only when rank 0, then rank 1, has written a part of its tensors.
        for step, (full, room) in enumerate([(0, 10), (0, 8192), (1, 8192)], start=1):
            if world.rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
            try:
                saver.save(state(10 * step))
                message = "it was written"
            except ValueError as error:
                message = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            then = newest(root).name
            told.append((message, then, saver.save(state(step + 1)).name))
            assert newest(root).name == told[-1][2]
    return told


def test_a_full_disk_costs_nothing_but_this_checkpoint(root):
    with RankPool(2) as pool:  # its own: the limit must not reach other tests
        both = pool.run(2, fill_the_disk, root, timeout=60)
    for step, told in enumerate(zip(*both, strict=True), start=1):
        for message, then, after in told:  # on each rank
            assert message.startswith(f"could not write checkpoint {root / f'step_{10 * step:08d}'}: ")
            assert "[Errno 27] File too large" in message and "MiB free" in message and "intact" in message
            assert "\n" not in message
            assert (then, after) == (f"step_{step:08d}", f"step_{step + 1:08d}")
    assert sorted(p.name for p in root.iterdir()) == [f"step_{step:08d}" for step in (1, 2, 3, 4)]


def test_a_place_that_cannot_be_written_is_named(engine, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"could not write checkpoint .*file/checkpoints/step_00000001: .*Not a dir"):
        Checkpointer(tmp_path / "file" / "checkpoints", engine, keep=1).save(state(1))


@pytest.mark.parametrize(
    "other, told",
    [
        (
            {"ffn_hidden_size": 64},
            r"of another shape: layers.0.ffn.experts.w_in "
            r"\(\(4, 32, 2, 48\) in the checkpoint, \(4, 32, 2, 64\) in the model\)",
        ),
        ({"num_layers": 1}, r"not in the model: layers.1.attention.\S+, .* and \d+ more"),
        ({"num_layers": 4}, r"not in the checkpoint: layers.2.attention.\S+, .* and \d+ more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(runtime, saved, root, other, told):
    engine = build_engine(runtime, Variant({**VARIANT.model, **other}, VARIANT.moe))
    with pytest.raises(ValueError, match=f"{saved[1].name} is of another model: {told}"):
        Checkpointer(root, engine, keep=2).load(saved[1])


@pytest.mark.parametrize("kind", ["weights", "exp_avg_sq"])
def test_what_is_not_complete_is_not_published(engine, saved, root, monkeypatch, kind):
    whole = optimizer_state.to_save
    left_out = f"{kind}.layers.1.ffn.router.weight"
    monkeypatch.setattr(
        optimizer_state, "to_save", lambda engine: {k: v for k, v in whole(engine).items() if k != left_out}
    )
    from megatron.core.dist_checkpointing.core import CheckpointingException

    with pytest.raises(CheckpointingException, match=left_out):
        Checkpointer(root, engine, keep=2).save(state(3))
    assert newest(root) == saved[1]


def save_without_a_part(world: World, root: Path) -> None:
    """The second rank leaves out its half of a parameter."""
    whole = optimizer_state.to_save
    left_out = "weights.layers.0.attention.qkv.weight"

    def lossy(engine: Any) -> dict[str, Any]:
        return {k: v for k, v in whole(engine).items() if world.rank == 0 or k != left_out}

    optimizer_state.to_save = lossy  # no need to put it back: this ends the ranks
    with started(world, ParallelConfig(tp=2)) as runtime:
        engine = build_engine(runtime, VARIANT)
        train(engine, range(1))
        Checkpointer(root, engine, keep=2).save(state(1, 2))


def test_every_rank_has_to_write_its_part(root):
    with RankPool(2) as pool, pytest.raises(RankFailed, match=r"(?s)CheckpointingException.*qkv"):
        pool.run(2, save_without_a_part, root, timeout=60)
    assert checkpoint.step_directories(root) == []


def test_copies_may_be_moved(saved, tmp_path):
    """A step's directory is all there is: nothing in it knows where it lies."""
    moved = tmp_path / "elsewhere" / saved[1].name
    shutil.copytree(saved[1], moved)
    assert checkpoint.find_damage(moved) is None and checkpoint.resolve(str(moved)) == moved


class Held(CheckpointWriter):
    """Writes nothing until it is let go."""

    go = threading.Event()

    def _write(self) -> None:
        self.go.wait()
        super()._write()


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(checkpoint, "CheckpointWriter", Held)
    Held.go.clear()
    yield Held.go
    Held.go.set()


def test_what_is_written_later_is_what_was_there_when_it_began(runtime, root, held):
    engine = build_engine(runtime, VARIANT)
    train(engine, range(1))
    saver, before = Checkpointer(root, engine, keep=2), copy.deepcopy(optimizer_tensors(engine))
    bias = engine.modules[0].get_parameter("layers.0.ffn.router.bias").clone()
    saver.begin_save(state(1))
    assert saver.finalize_save(wait=False) is None and newest(root) is None
    train(engine, range(1, 2))
    assert not torch.equal(bias, engine.modules[0].get_parameter("layers.0.ffn.router.bias"))
    held.set()
    path = saver.finalize_save(wait=True)
    assert path == newest(root) and path.name == "step_00000001"
    assert saver.finalize_save(wait=True) is None  # there is nothing left to settle
    other = build_engine(runtime, VARIANT)
    Checkpointer(root, other, keep=2).load(path)
    for kind, tensors in optimizer_tensors(other).items():
        assert all(torch.equal(tensor, before[kind][name]) for name, tensor in tensors.items())
    assert torch.equal(other.modules[0].get_parameter("layers.0.ffn.router.bias"), bias)


def test_what_fails_in_the_background_is_told_when_it_is_settled(engine, saved, root, held, monkeypatch):
    saver = Checkpointer(root, engine, keep=2)
    saver.begin_save(state(3))
    shutil.rmtree(next(root.glob(".writing-*")))  # the disk under the writer's feet
    held.set()
    with pytest.raises(ValueError, match=r"could not write checkpoint .*step_00000003: .*No such file.*intact"):
        saver.finalize_save(wait=True)
    assert newest(root) == saved[1]
    monkeypatch.undo()
    assert saver.save(state(3)) == newest(root)


def settle_when_all_are_done(world: World, root: Path) -> tuple[bool, bool]:
    """(settled while another rank was still writing, settled after it was done)."""
    checkpoint.CheckpointWriter = Held  # as written by this rank
    try:
        with started(world, ParallelConfig()) as runtime:
            engine = build_engine(runtime, VARIANT)
            train(engine, range(1))
            saver = Checkpointer(root, engine, keep=2)
            Held.go.clear()
            saver.begin_save(state(1, world.size))
            if world.rank == 0:
                Held.go.set()
                saver._pending_save[0].finish_file()
            early = saver.finalize_save(wait=False)
            Held.go.set()
            saver._pending_save[0].finish_file()
            return early is not None, saver.finalize_save(wait=False) is not None
    finally:
        checkpoint.CheckpointWriter = CheckpointWriter


def test_ranks_settle_together(ranks, root):
    assert ranks.run(2, settle_when_all_are_done, root, timeout=60) == [(False, True)] * 2


def save_a_part_twice(world: World, root: Path) -> None:
    """Both ranks write the first one's half of a parameter."""
    whole = optimizer_state.to_save

    def greedy(engine: Any) -> dict[str, Any]:
        tensors = whole(engine)
        key = "weights.layers.0.attention.qkv.weight"
        tensors[key] = replace(tensors[key], global_offset=(0, 0))
        return tensors

    optimizer_state.to_save = greedy  # no need to put it back: this ends the ranks
    with started(world, ParallelConfig(tp=2)) as runtime:
        engine = build_engine(runtime, VARIANT)
        train(engine, range(1))
        Checkpointer(root, engine, keep=2).save(state(1, 2))


def test_no_part_may_be_written_twice(root):
    with RankPool(2) as pool, pytest.raises(RankFailed, match=r"(?s)CheckpointingException.*qkv"):
        pool.run(2, save_a_part_twice, root, timeout=60)
    assert checkpoint.step_directories(root) == []


def test_a_tensor_with_a_hole_does_not_count(saved):
    key = "exp_avg.layers.1.ffn.experts.w_in"
    manifest = checkpoint.read_manifest(saved[1])
    assert manifest["tensors"][key].is_complete()
    assert manifest["tensors"][key].is_complete()
    manifest["tensors"][key].shards.clear()
    write_manifest(saved[1], **manifest)
    assert not checkpoint.read_manifest(saved[1])["tensors"][key].is_complete()
