"""Runs continue with the samples that they were promised, whatever was read ahead and whoever began them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import BlendPart, BlendStage, Config
from corpus.prepare import Prepared
from corpus.stream import TrainStream
from parallel.checkpoint_manifest import MANIFEST, _digest_of
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.corpus.helpers import write_pair
from tests.training.helpers import rows, tiny_config, train, trajectory, write_corpus
from training.run_dir import open_run_dir

LIMIT = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(corpus: Path, run_dir: Path, read_ahead: int = 2, **settings: int) -> Config:
    config = tiny_config(corpus, run_dir, **{"steps": 6, **settings})
    config.data.read_ahead, config.eval.sample_tokens = read_ahead, 0
    return config


def train_in_the_first_order(world: World, config: Config) -> int:
    """As an earlier version began runs (rank function for the pool)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.trainer.DATA_ORDER", 1)
        return train(world, config)


def test_a_checkpoint_of_an_earlier_version_continues_in_its_order(
    corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(1, train_in_the_first_order, config_of(corpus, tmp_path / "whole"), timeout=LIMIT) == [0]
    assert ranks.run(1, train_in_the_first_order, config_of(corpus, tmp_path / "run", stop_after=3), timeout=LIMIT)
    path = tmp_path / "run/checkpoints/step_00000003" / MANIFEST
    manifest = json.loads(path.read_text())
    # What that version wrote.
    assert manifest["state"].pop("data_order") == 1
    assert manifest["state"].keys() == {"step", "samples", "tokens", "updates", "world_size"}
    manifest["format"] = 2
    manifest["digest"] = _digest_of(manifest)
    path.write_text(json.dumps(manifest))

    assert ranks.run(1, train, config_of(corpus, tmp_path / "run"), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    last = json.loads((tmp_path / "run/checkpoints/step_00000006" / MANIFEST).read_text())
    assert last["state"]["data_order"] == 1
    assert ranks.run(1, train, config_of(corpus, tmp_path / "new"), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "new") != trajectory(tmp_path / "whole")


def test_what_was_read_ahead_and_not_used_is_read_again(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, train, config_of(corpus, tmp_path / "whole", read_ahead=0), timeout=LIMIT) == [0, 0]
    for read_ahead, stop_after in ((4, 2), (1, 3), (0, 6)):
        config = config_of(corpus, tmp_path / "run", read_ahead, stop_after=stop_after)
        assert ranks.run(2, train, config, timeout=LIMIT) == [0, 0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")


def blend_config(corpus: Path, run_dir: Path, stop_after: int | None = None) -> Config:
    config = config_of(corpus, run_dir, steps=8)
    config.train.stop_after = stop_after
    text = BlendPart(weight=3, files=[str(corpus)], name="text")
    config.data = replace(config.data, kind="blend", files=[], blend=[text, BlendPart(files=[str(corpus)])])
    config.data.stages = [BlendStage(step=5, weights=[1, 3])]
    config.eval = replace(config.eval, every=4, by_part=True)
    return config


def shares(run_dir: Path) -> list[float]:
    return [row["share/text"] for row in rows(run_dir)]


def test_a_run_continues_in_any_stage_of_a_blend(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, train, blend_config(corpus, tmp_path / "whole"), timeout=LIMIT) == [0]
    for stop_after in (3, 4, 6, None):
        assert ranks.run(1, train, blend_config(corpus, tmp_path / "run", stop_after), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    taken = shares(tmp_path / "whole")
    assert taken == shares(tmp_path / "run")
    assert sum(taken[:4]) == pytest.approx(4 * 0.75, abs=2 / 8) and sum(taken[4:]) == pytest.approx(4 * 0.25, abs=2 / 8)
    assert all(row["share/text"] + row["share/1_text"] == 1 for row in rows(tmp_path / "run"))


def test_the_held_out_loss_of_each_part(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """The whole is the mean of the parts (up to how the last batches are filled)."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"Numbers: {' '.join(map(str, range(n, n + 30)))}."}) + "\n" for n in range(99))
    )
    config = blend_config(corpus, tmp_path / "run")
    config.data.blend[1].files = [str(other)]
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    evaluations = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    last = evaluations[-1]
    parts = last["val_loss/text"], last["val_loss/1_text"]
    assert min(parts) < last["val_loss"] < max(parts)
    prepared = Prepared.from_json((tmp_path / "run/data.json").read_text())
    tokens = [source.num_tokens - 1 for source in prepared.valid]
    assert last["val_loss"] == pytest.approx(np.average(parts, weights=tokens), rel=2e-2)


def train_with_a_failing_disk(world: World, config: Config) -> int:
    sample = TrainStream.sample

    def fail(self: TrainStream, index: int) -> dict:
        if index >= 2 * config.train.global_batch_size:
            raise OSError("the disk of the data is gone")
        return sample(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStream, "sample", fail)
        return train(world, config)


def test_an_error_of_the_reading_thread_ends_the_run_with_its_message(
    corpus: Path, ranks: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed, match="the disk of the data is gone"):
        ranks.run(1, train_with_a_failing_disk, config_of(corpus, tmp_path / "run", read_ahead=3), timeout=LIMIT)
    assert [row[0] for row in trajectory(tmp_path / "run")] == [1, 2], "what was read before it is used"
    assert ", in fail" in (tmp_path / "run/train.log").read_text()


def test_a_run_with_epochs_continues_and_is_not_spread_anew(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    def config(run_dir: Path, steps: int = 6, stop_after: int | None = None, stages: list[BlendStage] = []) -> Config:  # noqa: B006
        found = blend_config(corpus, run_dir, stop_after)
        found.data.blend[0] = replace(found.data.blend[0], epochs=0.04, weight=1)
        found.data.stages, found.train.steps, found.eval.every, found.eval.by_part = stages, steps, 0, False
        return found

    assert ranks.run(1, train, config(tmp_path / "whole"), timeout=LIMIT) == [0]
    for stop_after in (1, 3, None):
        assert ranks.run(1, train, config(tmp_path / "run", stop_after=stop_after), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    taken = shares(tmp_path / "run")
    assert sum(taken) * 8 == pytest.approx(0.04 * sequences(tmp_path / "run"), abs=0.5) and min(taken) > 0
    with pytest.raises(ValueError, match=r"spread over 6 steps.* 'data.stages=\[\{step: 7, weights: \[0, 1.0\]\}\]'"):
        open_run_dir(config(tmp_path / "run", steps=8))
    continued = config(tmp_path / "run", steps=8, stages=[BlendStage(step=7, weights=[0, 1])])
    assert ranks.run(1, train, continued, timeout=LIMIT) == [0]
    assert shares(tmp_path / "run") == [*taken, 0, 0]
    assert (
        "blend" in (tmp_path / "run/train.log").read_text()
        and "text 0.04 as set" in (tmp_path / "run/train.log").read_text()
    )


def sequences(run_dir: Path) -> int:
    """Of an epoch of the first part."""
    source = Prepared.from_json((run_dir / "data.json").read_text()).train[0]
    return (source.num_tokens - 1) // 32


def test_a_run_on_objects_is_that_on_local_files(ranks: RankPool, tmp_path: Path) -> None:
    """Stopped and continued, with an evaluation, on two ranks that share the blocks of a token file at a URL."""
    ids = np.random.default_rng(0).integers(1, 250, (60, 50)).tolist()
    prefix = write_pair(tmp_path / "pair", ids)
    for name, path, stop_after in (("a", prefix, None), ("b", f"file://{prefix}", 3), ("b", f"file://{prefix}", None)):
        config = config_of(tmp_path / "corpus", tmp_path / name, stop_after=stop_after)
        config.eval.every = 2
        config.data = replace(config.data, kind="megatron", files=[path], valid_fraction=0.2)
        ranks.run(2, train, config, timeout=LIMIT)
    assert len(trajectory(tmp_path / "a")) == 6 and trajectory(tmp_path / "b") == trajectory(tmp_path / "a")
    assert [*(tmp_path / "cache" / "streams").glob("*/pair.blocks")]
