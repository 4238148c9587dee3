"""Damaged checkpoints are reported, renamed and never loaded; manifests are validated."""

import errno
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conf.schema import ParallelConfig
from parallel import checkpoint, checkpoint_format, checkpoint_manifest, optimizer_state, progress_sync, weight_loading
from parallel.checkpoint import Checkpointer, NonFiniteState
from parallel.checkpoint_manifest import MANIFEST, UnsupportedVersion
from parallel.env import World
from parallel.watchdog import Watchdog
from tests.parallel import helpers
from tests.parallel.helpers import Variant, build_engine, optimizer_tensors, started, train

state = partial(helpers.state, updates=1)
VARIANT = Variant({"num_layers": 2}, {"bias_update_rate": 0.01})


@pytest.fixture(scope="module")
def engine(runtime):
    engine = build_engine(runtime, VARIANT)
    train(engine, range(1))
    return engine


@pytest.fixture
def saver(engine, tmp_path) -> Checkpointer:
    """With the checkpoints 1 and 2."""
    saver = Checkpointer(tmp_path / "checkpoints", engine, keep=2)
    saver.save(state(1))
    saver.save(state(2))
    return saver


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def shard_of(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


DAMAGES = {"missing": Path.unlink, "bytes instead of": truncate, "changed": flip_a_bit}


@pytest.mark.parametrize("why", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saver, why):
    newest, root, warnings = saver.last_good, saver.root, []
    DAMAGES[why](shard_of(newest))
    with pytest.raises(ValueError, match=f"{newest.name}.*{why}"):
        checkpoint.resolve(str(newest))
    before = root / "step_00000001"
    assert checkpoint.resolve(str(root.parent)) == checkpoint.resolve(str(root)) == saver.resolve(str(root)) == before
    assert saver.resume(warnings.append) == (before, state(1))
    assert newest.name in warnings[0] and why in warnings[0] and "damaged-step_00000002" in warnings[1]
    assert names(root) == ["damaged-step_00000002", "step_00000001"]
    assert saver.resume(pytest.fail) == (before, state(1))  # nothing is told twice


def test_pruning_counts_whole_checkpoints_of_this_run_alone(engine, saver):
    """Checkpoints 3 to 5 are damaged when the run goes on from 2."""
    many = Checkpointer(saver.root, engine, keep=9)
    for step in (3, 4, 5):
        truncate(shard_of(many.save(state(step))))
    again = Checkpointer(saver.root, engine, keep=2)
    assert again.resume(lambda _: None) == (saver.root / "step_00000002", state(2))
    again.save(state(3))
    aside = [f"damaged-step_0000000{step}" for step in (3, 4, 5)]
    assert names(saver.root) == [*aside, "step_00000002", "step_00000003"]
    assert again.last_good.name == "step_00000003"


def test_what_is_no_checkpoint_directory_is_damage_or_left_alone(engine, saver, tmp_path):
    """A file, a pipe as manifest, and a link to a checkpoint elsewhere, of which only the link is pruned."""
    (saver.root / "step_00000009").write_text("not a directory")
    (saver.root / "step_00000008").mkdir()
    os.mkfifo(saver.root / "step_00000008" / MANIFEST)
    again = Checkpointer(saver.root, engine, keep=2)
    assert again.resume(lambda _: None) == (saver.root / "step_00000002", state(2))
    first, elsewhere = saver.root / "step_00000001", tmp_path / "elsewhere"
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    again.save(state(3))
    assert names(saver.root) == [f"damaged-step_0000000{n}" for n in (8, 9)] + ["step_00000002", "step_00000003"]
    assert (elsewhere / MANIFEST).is_file()


def test_later_checkpoints_are_no_reason_to_delete_the_one_just_written(engine, saver):
    """As of a run that began again beside what another line of it had left."""
    shutil.copytree(saver.last_good, saver.root / "step_00000008")
    shutil.copytree(saver.last_good, saver.root / "step_00000009")
    Checkpointer(saver.root, engine, keep=1).save(state(3))
    assert names(saver.root) == ["step_00000003", "step_00000008", "step_00000009"]


def test_when_all_are_damaged_the_run_does_not_begin_again_unasked(saver):
    for number in (1, 2):
        truncate(saver.root / f"step_0000000{number}" / MANIFEST)
    for read in (lambda: saver.resume(lambda _: None), lambda: checkpoint.resolve(str(saver.root))):
        with pytest.raises(ValueError, match=r"step_00000002: .*step_00000001: ") as told:
            read()
    assert names(saver.root) == ["step_00000001", "step_00000002"]
    with pytest.raises(ValueError, match=r"checkpoint\.resume=fresh") as told:
        saver.resume(lambda _: None)
    assert "\n" not in str(told.value)
    assert saver.resume(lambda _: None, fresh=True) is None
    assert names(saver.root) == ["damaged-step_00000001", "damaged-step_00000002"]
    assert saver.resume(pytest.fail) is None


def test_where_nothing_was_saved_there_is_none(engine, tmp_path):
    assert Checkpointer(tmp_path / "none", engine, keep=1).resume(pytest.fail) is None
    with pytest.raises(ValueError, match="found none"):
        checkpoint.resolve(str(tmp_path))


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(engine, saver, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_manifest.os, "listdir", refuse)
    with pytest.raises(ValueError, match=r"checkpoints.* cannot be read: .*Permission denied"):
        saver.resume(pytest.fail)


def rewrite(directory: Path, change: Any, *, digest: bool = False) -> None:
    """Changes a manifest behind the program's back, with or without its hash."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    manifest = change(manifest) or manifest
    if digest:
        manifest["digest"] = checkpoint_manifest._digest_of(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("counter", ["step", "samples", "tokens", "updates", "world_size"])
def test_a_changed_counter_is_damage(saver, counter):
    rewrite(saver.last_good, lambda m: m["state"].update({counter: m["state"][counter] + 1}))
    assert "has changed since it was written" in checkpoint.find_damage(saver.last_good)


@pytest.mark.parametrize(("counter", "told"), [("step", "is of step 3"), ("updates", "counts 2 updates, the optim")])
def test_counters_are_checked_against_what_they_count(saver, counter, told):
    """Even where the manifest's hash is right."""
    rewrite(saver.last_good, lambda m: m["state"].update({counter: m["state"][counter] + 1}), digest=True)
    assert told in checkpoint.find_damage(saver.last_good)


def test_the_list_of_files_is_not_believed(saver):
    flip_a_bit(shard_of(saver.last_good))
    rewrite(saver.last_good, lambda m: m["files"].clear())
    assert "has changed since it was written" in checkpoint.find_damage(saver.last_good)
    rewrite(saver.last_good, lambda m: None, digest=True)
    assert "has no place for a part of" in checkpoint.find_damage(saver.last_good)


def test_a_file_that_no_entry_names_is_damage(saver):
    (saver.last_good / ".nfs0001").touch()  # the file system's own
    assert checkpoint.find_damage(saver.last_good) is None
    shutil.copy(shard_of(saver.last_good), saver.last_good / "rank_00001.safetensors")
    assert "rank_00001.safetensors is not listed" in checkpoint.find_damage(saver.last_good)


SHAPES = {
    "a list": lambda m: [m],
    "a number": lambda m: 7,
    "nothing": lambda m: {"digest": ""},
    "no hash": lambda m: {k: v for k, v in m.items() if k not in ("digest", "state")},
    "no files": lambda m: {k: v for k, v in m.items() if k != "files"},
    "no counter": lambda m: m["state"].pop("samples") and None,
    "an unknown counter": lambda m: m["state"].update(epochs=1),
    "a counter in words": lambda m: m["state"].update(step="two"),
    "files elsewhere": lambda m: m["files"].update({"../x": [1, "a"]}),
    "files without sizes": lambda m: m["files"].update(x=None),
    "tensors in a list": lambda m: {**m, "tensors": [1]},
    "parts outside": lambda m: m["tensors"]["weights.head.weight"]["boxes"][0][1].__setitem__(0, 1 << 40),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_of_another_shape_is_damage(saver, shape):
    path = saver.last_good / MANIFEST
    manifest = json.loads(path.read_text())
    changed = SHAPES[shape](manifest)
    changed = manifest if changed is None else changed
    if isinstance(changed, dict) and "digest" in changed:
        changed["digest"] = checkpoint_manifest._digest_of(changed)
    path.write_text(json.dumps(changed))
    warnings: list[str] = []
    assert saver.resume(warnings.append) == (saver.root / "step_00000001", state(1))
    assert "step_00000002 is damaged" in warnings[0] and MANIFEST in warnings[0]


def test_what_another_version_wrote_is_not_called_damaged(saver):
    rewrite(saver.last_good, lambda m: m.update(format=4, more=1), digest=True)
    with pytest.raises(
        UnsupportedVersion, match=r"step_00000002 was written by a newer version of Switchyard \(format 4"
    ):
        saver.resume(pytest.fail)
    rewrite(saver.last_good, lambda m: {"state": {"step": 2, "updates": 1}, "files": {}})
    with pytest.raises(UnsupportedVersion, match=r"written by an earlier version .*pickled"):
        saver.resume(pytest.fail, fresh=True)
    assert names(saver.root) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("file", ["rank_00000.safetensors", MANIFEST])
def test_an_input_error_is_damage(saver, file, monkeypatch):
    """Of the disk, while the newest checkpoint is hashed."""
    broken, opened = saver.last_good / file, Path.open

    def open_or_fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == broken:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_or_fail)
    warnings: list[str] = []
    assert saver.resume(warnings.append) == (saver.root / "step_00000001", state(1))
    assert file in warnings[0] and "Input/output error" in warnings[0]


def test_an_input_error_after_the_hashing_is_damage_too(saver, monkeypatch):
    """And leaves the model as it was until the one before is read."""
    before, fill = optimizer_tensors(saver.engine), checkpoint_format.TensorFile._fill

    def fail(self: Any, start: int, view: memoryview) -> None:
        if self._path.parent == newest and len(view) > 2000:
            raise OSError(errno.EIO, "Input/output error")
        fill(self, start, view)

    newest = saver.last_good
    monkeypatch.setattr(checkpoint_format.TensorFile, "_fill", fail)
    with pytest.raises(ValueError, match=r"rank_00000.safetensors cannot be read: .*Input/output"):
        saver.load(newest)
    after = optimizer_tensors(saver.engine)
    assert all(torch.equal(after[kind][name], t) for kind in before for name, t in before[kind].items())
    warnings: list[str] = []
    assert saver.resume(warnings.append) == (saver.root / "step_00000001", state(1))
    assert "step_00000002 is damaged (rank_00000.safetensors cannot be read" in warnings[0]


@pytest.mark.parametrize("kind", ["weights", "exp_avg"])
def test_what_is_not_finite_is_not_saved(runtime, tmp_path, kind):
    engine = build_engine(runtime, VARIANT)
    train(engine, range(1))
    saver = Checkpointer(tmp_path, engine, keep=1)
    saver.save(state(1))
    tensors = optimizer_tensors(engine)[kind]
    name = next(iter(tensors))
    shard = optimizer_state._optimizer_shards(engine)[engine.modules[0].get_parameter(name)]
    (shard.master.data if kind == "weights" else shard.inner.state[shard.master][kind])[0] = float("nan")
    with pytest.raises(
        NonFiniteState, match=f"step_00000002 is not written: {kind} of {name} is not finite.*step_00000001"
    ):
        saver.save(state(2))
    assert names(tmp_path) == ["step_00000001"]


def judge_damaged(world: World, root: Path) -> list[list[str]]:
    """Warnings of a resume after each file of the newest was damaged in turn, as this rank sees it."""
    directory, judged = root / "step_00000002", []
    with started(world, ParallelConfig()) as runtime:
        meet, saver = runtime.groups.world.barrier, Checkpointer(root, build_engine(runtime, VARIANT), keep=2)
        for name in names(directory):
            content = (directory / name).read_bytes()
            meet().wait()
            if world.rank == 0:
                truncate(directory / name)
            meet().wait()
            warnings: list[str] = []
            assert saver.resume(warnings.append)[0].name == "step_00000001"
            judged.append(warnings)
            meet().wait()
            if world.rank == 0:
                (root / "damaged-step_00000002").rename(directory)
                (directory / name).write_bytes(content)
            meet().wait()
        assert saver.resume(pytest.fail)[0] == directory
    return judged


LOADS = {
    "resume": lambda saver, directory: saver.load(directory),
    "weights": lambda saver, directory: weight_loading.load_weights(saver.engine, directory),
    "weights, watched": lambda saver, directory: weight_loading.load_weights(
        saver.engine, directory, progress_sync=saver.progress_sync
    ),
}


def load_with_errors(world: World, directory: Path) -> dict[str, str]:
    """Rank function: what loading raises where one rank cannot read the manifest (0) or the tensors (1)."""
    read_bytes, found = Path.read_bytes, {}

    def unreadable(path: Path) -> bytes:
        if path.name == MANIFEST and world.rank == 0:
            raise OSError(errno.EIO, "no manifest here")
        return read_bytes(path)

    def no_tensors(*_: Any) -> Any:
        yield 0
        if world.rank == 1:
            raise checkpoint.CheckpointDamaged("no tensors here")

    with started(world, ParallelConfig(tp=2)) as runtime:
        saver = Checkpointer(directory.parent, build_engine(runtime, VARIANT), keep=2)
        for name, load in LOADS.items():
            faults = (Path, "read_bytes", unreadable), (weight_loading, "read_tensors", no_tensors)
            for owner, attribute, fault in faults:
                with mock.patch.object(owner, attribute, fault):
                    try:
                        load(saver, directory)
                    except checkpoint.CheckpointDamaged as error:
                        found[f"{name}: {attribute}"] = str(error)
            load(saver, directory)
    return found


def test_what_one_rank_cannot_read_is_raised_on_all(ranks, saver):
    first, second = ranks.run(2, load_with_errors, saver.last_good, timeout=60)
    assert first == second and len(first) == 2 * len(LOADS)
    assert all("no manifest here" in told or "no tensors here" in told for told in first.values())


def save_two(world: World, root: Path) -> None:
    with started(world, ParallelConfig(ep=2)) as runtime:
        engine = build_engine(runtime, VARIANT)
        train(engine, range(1))
        saver = Checkpointer(root, engine, keep=2)
        saver.save(state(1, 2))
        saver.save(state(2, 2))


def resume_slowly(world: World, root: Path, timeout: float) -> tuple[float, set[str]]:
    """(seconds, files hashed by this rank) of a resume whose rank 1 reads slower than the limit on stalls."""
    hashed, digest = set(), checkpoint_manifest.digest

    def slow(path: Path) -> Any:
        hashed.add(path.name)
        for _ in range(30 if world.rank else 1):
            time.sleep(timeout / 20)
            yield 1
        return (yield from digest(path))

    checkpoint_manifest.digest, progress_sync.SECONDS = slow, timeout / 20
    try:
        with started(world, ParallelConfig()) as runtime:
            saver, begun = Checkpointer(root, build_engine(runtime, VARIANT), keep=2), time.monotonic()
            with Watchdog(world, timeout, lambda: (0, saver.stages)):
                assert saver.resume(pytest.fail)[0] == saver.resolve(str(root)) == root / "step_00000002"
            return time.monotonic() - begun, hashed
    finally:
        checkpoint_manifest.digest, progress_sync.SECONDS = digest, 1.0


def test_ranks_look_for_damage_together(ranks, tmp_path):
    ranks.run(2, save_two, tmp_path, timeout=60)
    first, second = ranks.run(2, judge_damaged, tmp_path, timeout=60)
    assert first == second and len(first) == 3  # each rank's tensors and the manifest
    assert all("step_00000002 is damaged" in warnings[0] for warnings in first)


def test_reading_is_no_stall_and_is_shared(ranks, tmp_path):
    root = tmp_path / "checkpoints"
    ranks.run(2, save_two, root, timeout=60)
    (seconds, first), (_, second) = ranks.run(2, resume_slowly, root, 2.0, timeout=60)
    assert seconds > 4.0
    assert first.isdisjoint(second) and first | second == {"rank_00000.safetensors", "rank_00001.safetensors"}
