"""Small files of a run directory, whatever a kill or a full disk has left of them."""

from pathlib import Path

import pytest

from conf.schema import Config, RunConfig
from training import trainer
from training.run_files import json_lines, json_object, write_atomically
from training.worker import tell_batch_script

TORN = b'{"step": 1, "lr": 0.5}\n' + b"[" * 100_000 + b'\nnull\n3\n\xff\n{"step": 2, "val_loss": 1.0}\n{"step"'


def test_rows_among_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TORN)
    assert [row["step"] for row in json_lines(path)] == [1, 2]
    assert [row["step"] for row in json_lines(path, last_bytes=100)] == [2]
    assert json_lines(tmp_path / "nothing") == json_lines(tmp_path) == []
    assert json_object("[1]") is None and json_object(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(("step", "rate"), [(1, 0.5), (2, None), (3, None)])
def test_the_last_learning_rate_among_torn_lines(tmp_path: Path, step: int, rate: float | None) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(TORN)

    class Trainer(trainer.Trainer):
        def __init__(self) -> None:
            self.run_dir = trainer.RunDir(tmp_path, created=False, continued=True, changed=[], overrides=[])
            self.progress = trainer.Progress(step=step)

    assert Trainer()._last_rate() == rate


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"new")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_end_that_cannot_be_written_down_hides_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stop.json" / "inner").mkdir(parents=True)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    tell_batch_script(Config(run=RunConfig(dir=str(tmp_path))), 2, "a wrong setting")
