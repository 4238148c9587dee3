"""A run that is started again in its directory."""

from pathlib import Path

import pytest

from conf.schema import Config, OptimConfig
from parallel.local_launcher import RankPool
from tests.training.helpers import command_line, rows, start, tiny_config, train, write_corpus

LIMIT = 120.0


def test_data_that_changed_at_the_same_place_are_noticed(ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    config = tiny_config(corpus, tmp_path / "run", steps=2)
    warning, log = "the data are not those of the earlier steps", tmp_path / "run" / "train.log"

    def go_on() -> int:
        """How often it has been said by now."""
        config.train.steps += 1
        assert ranks.run(1, train, config, timeout=LIMIT) == [0]
        return log.read_text().count(warning)

    assert go_on() == 0
    config.data.tokenizer = str(tmp_path / "run" / "tokenizer.json")
    assert go_on() == 0
    moved = write_corpus(tmp_path / "run").rename(tmp_path / "elsewhere.jsonl")
    config.data.files = [str(moved)]
    assert go_on() == 0  # the same text
    moved.write_text(moved.read_text().replace("dog", "god"))
    assert go_on() == 1
    told = log.read_text().split(warning)[1].splitlines()[0]
    assert told.startswith(": other token files: ") and told.endswith(" tokens to train on)")
    assert go_on() == 1  # these are the run's data now
    # Files of another version that say nothing of it.
    (tmp_path / "run" / "data.json").write_text('{"train": 3}')
    assert go_on() == 1


def test_a_finished_run_started_again_adds_nothing(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=2)
    config.eval.every = 1
    kept = []
    for _ in range(2):
        assert ranks.run(1, train, config, timeout=LIMIT) == [0]
        kept.append((tmp_path / "run" / "metrics.jsonl").read_text())
    assert kept[0] == kept[1] and kept[0].count("val_loss") == 2 and len(rows(tmp_path / "run")) == 2


def test_a_run_goes_on_with_moments_of_another_type_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=2)
    config.precision = "bf16"
    config.optim.grad_dtype = config.optim.state_dtype = "bf16"
    config.optim.cpu_offload = True
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "BlockAdamW" in log and "gradients in bf16, moments in bf16, states in host memory" in log
    config.train.steps, config.optim.state_dtype = 3, "fp32"
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "settings differ" in log and "optim.state_dtype: bf16 -> fp32" in log
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_bf16_gradients_need_bf16_parameters() -> None:
    """precision=auto knows on the device alone what it is."""
    from training.builder import _refuse_bf16_gradients

    why = "the processor has no bf16 arithmetic"
    _refuse_bf16_gradients(Config(), why)
    with pytest.raises(ValueError, match=f"precision=auto is fp32 here \\({why}\\); nearest: optim.grad_dtype=fp32"):
        _refuse_bf16_gradients(Config(optim=OptimConfig(grad_dtype="bf16")), why)


def test_a_path_in_any_script_works_in_the_c_locale(tmp_path: Path) -> None:
    """Unquoted; started, and started again."""
    run_dir = tmp_path / "é ラン"
    command = command_line(write_corpus(tmp_path), run_dir, "train.steps=1")
    for words in ("new", "continued"):
        process = start(command, LC_ALL="C")
        output, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors
        assert words in output and f"run directory   {run_dir}\n" in output
    assert [row["step"] for row in rows(run_dir)] == [1]
