"""What commands do with checkpoints that are damaged or written by an attacker."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.commands import InferenceConfig
from conf.schema import CheckpointConfig, Config
from parallel.checkpoint_manifest import _digest_of
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import rows, tiny_config, train, write_corpus
from training.load_checkpoint import load_model

LIMIT = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 2, 3 and 4."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    config = tiny_config(corpus, run_dir, steps=12, stop_after=4)
    config.checkpoint, config.eval.sample_tokens = CheckpointConfig(every=1, keep=3), 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def truncate(directory: Path) -> None:
    shard = next(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def test_a_run_goes_on_before_the_damage_and_keeps_what_is_whole(corpus: Path, ranks: RankPool, run_dir: Path) -> None:
    for step in (3, 4):
        truncate(run_dir / f"checkpoints/step_0000000{step}")
    config = tiny_config(corpus, run_dir, steps=12, stop_after=3)
    config.checkpoint, config.eval.sample_tokens = CheckpointConfig(every=0, keep=2), 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    aside = [f"damaged-step_0000000{step}" for step in (3, 4)]
    assert checkpoints(run_dir) == [*aside, "step_00000002", "step_00000003"]
    log = (run_dir / "train.log").read_text()
    assert "step_00000004 is damaged" in log and "is renamed to damaged-step_00000004" in log


def test_a_run_of_damaged_checkpoints_begins_again_only_when_asked(
    corpus: Path, ranks: RankPool, run_dir: Path
) -> None:
    for step in (2, 3, 4):
        truncate(run_dir / f"checkpoints/step_0000000{step}")
    config = tiny_config(corpus, run_dir, steps=12, stop_after=1)
    config.checkpoint, config.eval.sample_tokens = CheckpointConfig(every=0), 0
    before = checkpoints(run_dir), rows(run_dir)
    with pytest.raises(RankFailed, match=r"ValueError: every checkpoint in .*step_00000004: .*step_00000002: .*fresh"):
        ranks.run(1, train, config, timeout=LIMIT)
    assert (checkpoints(run_dir), rows(run_dir)) == before
    config.checkpoint.resume = "fresh"
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    assert checkpoints(run_dir) == [*(f"damaged-{name}" for name in before[0]), "step_00000001"]


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def attacks(marker: Path) -> dict[str, bytes]:
    """By name, files that run code when an unpickler reads them."""
    torch.save(Attack(marker), marker.with_name("saved"))
    return {"pickle": pickle.dumps(Attack(marker)), "torch.save": marker.with_name("saved").read_bytes()}


def plant(directory: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint, and lets the manifest say that it belongs there."""
    (directory / name).write_bytes(content)
    path = directory / "manifest.json"
    if name != path.name:
        import hashlib

        manifest = json.loads(path.read_text())
        manifest["files"][name] = [len(content), hashlib.blake2b(content, digest_size=16).hexdigest()]
        manifest["digest"] = _digest_of(manifest)
        path.write_text(json.dumps(manifest))


def read_in_every_way(world: World, run_dir: Path, corpus: Path, marker: Path) -> int:
    """What evaluate and generate open a model with, a resume, and checkpoint.load. Returns how many took it."""
    taken = 0
    for read in ("open", "resume", "load"):
        copy = Path(shutil.copytree(run_dir, marker.with_name(f"{read}-{os.urandom(4).hex()}")))
        config = tiny_config(corpus, copy, steps=12, stop_after=5)
        config.checkpoint, config.eval.sample_tokens = CheckpointConfig(every=0), 0
        if read == "load":
            config.run.dir, config.checkpoint.load = str(copy.with_name(f"{copy.name}-new")), str(copy)
        try:
            if read == "open":
                with load_model(str(copy), InferenceConfig(precision="fp32")):
                    pass
            else:
                assert train(world, config) == 0
            taken += 1
        except ValueError as error:
            assert "step_00000004" in str(error)
        shutil.rmtree(copy)
    return taken


def test_no_file_of_a_checkpoint_runs_code(corpus: Path, ranks: RankPool, trained: Path, tmp_path: Path) -> None:
    """Each file, and those that torch.distributed.checkpoint would read, is an attacker's in turn; the hashes are
    right, so that nothing but the reader stands between it and the process."""
    shutil.copytree(trained, tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_0000000{step}")
    whole, marker = tmp_path / "run/checkpoints/step_00000004", tmp_path / "it-ran"
    names = {path.name for path in whole.iterdir()}
    assert names == {"rank_00000.safetensors", "manifest.json"}
    planted = [(name, "pickle") for name in [*names, ".metadata"]] + [("common.pt", "torch.save")]
    for name, kind in planted:
        shutil.copytree(whole, tmp_path / "kept")
        plant(whole, name, attacks(marker)[kind])
        taken = ranks.run(1, read_in_every_way, tmp_path / "run", corpus, marker, timeout=LIMIT)[0]
        assert taken == (0 if name in names else 3)
        assert not marker.exists(), name
        shutil.rmtree(whole)
        (tmp_path / "kept").rename(whole)
    pickle.loads(attacks(marker)["pickle"])
    assert marker.exists()  # the attack is one


def train_into_nan(world: World, config: Config) -> int:
    """A run in which Adam's moments stop being finite before the second step is saved."""
    from parallel.checkpoint import Checkpointer

    begin = Checkpointer.begin_save

    def spoil(self: Checkpointer, state: dict[str, int]) -> None:
        if state["step"] == 2:
            optimizer = self.engine.optimizer.chained_optimizers[0].optimizer
            next(iter(optimizer.state.values()))["exp_avg"][0] = float("nan")
        begin(self, state)

    Checkpointer.begin_save = spoil
    try:
        return train(world, config)
    finally:
        Checkpointer.begin_save = begin


def test_what_is_not_finite_ends_the_run_and_is_not_kept(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=4)
    config.checkpoint = CheckpointConfig(every=1, keep=1)
    assert ranks.run(1, train_into_nan, config, timeout=LIMIT) == [1]
    assert checkpoints(tmp_path / "run") == ["step_00000001"]
    log = (tmp_path / "run/train.log").read_text()
    assert "step_00000002 is not written: exp_avg of " in log and "The last good checkpoint is " in log
    assert "step_00000001. Lower optim.lr" in log
