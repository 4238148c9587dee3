"""Runs whose directory cannot be written any more: a checkpoint where there is room, one message, exit code 1."""

import shutil
import unittest.mock
from pathlib import Path

import pytest

from conf.schema import Config
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import rows, tiny_config, train, trajectory, write_corpus

LIMIT = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "expert_load.jsonl"])
def test_figures_that_cannot_be_kept_end_the_run_with_a_checkpoint(
    corpus: Path, ranks: RankPool, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).symlink_to("/dev/full")
    assert ranks.run(2, train, tiny_config(corpus, run_dir, steps=4), timeout=LIMIT) == [1, 1]
    assert checkpoints(run_dir) == ["step_00000002"]  # the ranks hear of the failure of step 1 in the second
    log = (run_dir / "train.log").read_text()
    assert f"{name}: No space left on device. The run ends with a checkpoint of step 2" in log
    (run_dir / name).unlink()
    assert ranks.run(2, train, tiny_config(corpus, run_dir, steps=4), timeout=LIMIT) == [0, 0]
    assert [row["step"] for row in rows(run_dir)][-2:] == [3, 4]


def test_a_file_in_the_way_of_the_figures(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    assert ranks.run(1, train, tiny_config(corpus, tmp_path / "run", steps=2), timeout=LIMIT) == [1]
    assert "Is a directory. The run ends before its first step" in (tmp_path / "run" / "train.log").read_text()


def train_on_a_full_disk(world: World, config: Config) -> int:
    """Rank function: no checkpoint can be written."""
    error = ValueError("could not write checkpoint step_00000002: [Errno 28] No space left on device")
    with unittest.mock.patch("parallel.checkpoint.Checkpointer.begin_save", side_effect=error):
        return train(world, config)


def test_a_checkpoint_that_cannot_be_written_is_a_failure_in_mid_run(
    corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert ranks.run(2, train_on_a_full_disk, tiny_config(corpus, run_dir, steps=2), timeout=LIMIT) == [1, 1]
    assert "error: could not write checkpoint" in (run_dir / "train.log").read_text()
    assert '"code": 1' in (run_dir / "stop.json").read_text()


def test_tensorboard_alone_ends_no_run(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("in the way")
    assert ranks.run(1, train, tiny_config(corpus, run_dir, steps=2), timeout=LIMIT) == [0]
    assert (run_dir / "train.log").read_text().count("TensorBoard's files cannot be written") == 1


def close_after_a_failure(world: World, config: Config) -> list[bool]:
    """Rank function: whether the files of figures are closed when the third step has failed."""
    from training.trainer import Trainer

    logs, step, opened = [], Trainer._step, Trainer._open_log

    def fail(self: Trainer, *, logged: bool) -> tuple[float, float]:
        if self.progress.step == 2:
            raise RuntimeError("no third step")
        return step(self, logged=logged)

    def keep(self: Trainer) -> object:
        logs.append(opened(self))
        return logs[-1]

    with unittest.mock.patch.multiple(Trainer, _step=fail, _open_log=keep):
        try:
            train(world, config)
        except RuntimeError as error:
            assert "no third step" in str(error)
    return [file.closed for file in (logs[0]._rows, logs[0]._loads)]


def test_a_run_that_fails_closes_its_files_of_figures(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """The expert load of its last step is drawn too."""
    config = tiny_config(corpus, tmp_path / "run", steps=4)
    assert ranks.run(1, close_after_a_failure, config, timeout=LIMIT) == [[True, True]]


def train_and_delete(world: World, config: Config) -> int:
    """Rank function: the run directory is gone after the second step, which the ranks see in the third."""
    from training.trainer import Trainer

    original = Trainer._log

    def log(self: Trainer, *args: object, **named: object) -> None:
        original(self, *args, **named)
        if self.progress.step == 2 and self.is_main:
            shutil.rmtree(self.run_dir.path)

    with unittest.mock.patch.object(Trainer, "_log", log), unittest.mock.patch("training.agreement.LOOK_SECONDS", 0.0):
        return train(world, config)


def test_a_deleted_run_directory_is_made_again_for_a_checkpoint(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=4)
    assert ranks.run(2, train_and_delete, config, timeout=LIMIT) == [1, 1]
    assert "was deleted or moved during the run" in (tmp_path / "run" / "stop.json").read_text()
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    assert ranks.run(2, train, config, timeout=LIMIT) == [0, 0]
    whole = tiny_config(corpus, tmp_path / "whole", steps=4)
    assert ranks.run(2, train, whole, timeout=LIMIT) == [0, 0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")[3:]
