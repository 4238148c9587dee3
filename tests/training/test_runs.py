"""Whole runs: continued, killed, stopped, spread over ranks, gone wrong."""

import gzip
import importlib
import json
import math
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf.commands import EvaluateConfig, EvaluateDataConfig, GenerateConfig
from conf.schema import CheckpointConfig, GuardConfig, OptimConfig
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import command_line, rows, start, tiny_config, train, trajectory, with_layout, write_corpus
from training.metrics import step_keys

LIMIT = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps in one go."""
    run_dir = tmp_path_factory.mktemp("run") / "undisturbed"
    config = tiny_config(corpus, run_dir)
    config.eval.every = config.checkpoint.every = 10
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    return run_dir


def test_a_run_leaves_what_the_contract_says(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [tuple(line) for line in steps] == [step_keys()] * 20
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert steps[-1]["tokens"] == 20 * 8 * 32 and steps[-1]["mfu"] is None and steps[-1]["world_size"] == 1
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20]
    assert evaluations[1]["val_loss"] < evaluations[0]["val_loss"] < math.log(320)
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert {"config.yaml", "tokenizer.json", "train.log"} <= {p.name for p in undisturbed.iterdir()}
    log = (undisturbed / "train.log").read_text()
    assert "gzip -9: " in log and "bits/byte" in log
    board = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    assert board.Tags()["images"] == ["moe/expert_load"]
    logged = [event.value for event in board.Scalars("train/loss")]
    assert logged == pytest.approx([line["loss"] for line in steps], rel=1e-6)


def test_it_learns(undisturbed: Path) -> None:
    losses = [row["loss"] for row in rows(undisturbed)]
    assert losses[0] == pytest.approx(math.log(320), abs=0.2)  # knows nothing: uniform over the vocabulary
    assert losses[-1] < losses[0] - 1.0


def test_ten_and_ten_steps_are_twenty(corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path) -> None:
    first = tiny_config(corpus, tmp_path / "run", stop_after=10)
    assert ranks.run(1, train, first, timeout=LIMIT) == [0]
    assert len(rows(tmp_path / "run")) == 10
    assert ranks.run(1, train, tiny_config(corpus, tmp_path / "run"), timeout=LIMIT) == [0]
    assert trajectory(tmp_path / "run") == trajectory(undisturbed)


def test_loads_and_noise_of_the_routers_continue(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """The loads of the last step are in the checkpoint; jitter and random drops are named by the step."""
    moe = {"load_balancing": "global_aux_loss", "aux_loss_coeff": 0.1, "jitter": 0.1, "drop_policy": "random"}
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop_after in stops:
            config = tiny_config(corpus, tmp_path / name, steps=5, stop_after=stop_after)
            config.model.moe = replace(config.model.moe, capacity_factor=1.0, **moe)
            assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    whole = trajectory(tmp_path / "whole")
    assert trajectory(tmp_path / "parts") == whole and len(whole) == 5
    aux, dropped = ([row[key] for row in rows(tmp_path / "whole")] for key in ("aux_loss", "dropped_fraction"))
    assert aux[0] == pytest.approx(1) and aux[1] > 1.001 and min(dropped) > 0


def test_experts_that_choose_are_warned_of_and_write_no_text(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=2)
    config.model.moe.load_balancing, config.eval.sample_tokens = "expert_choice", 0
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    assert "warning: model.moe.load_balancing=expert_choice is not causal" in (tmp_path / "run/train.log").read_text()
    settings = {"checkpoint": str(tmp_path / "run"), "precision": "fp32"}
    assert "is not causal" in ranks.run(1, printed, "evaluate", EvaluateConfig(**settings), timeout=LIMIT)[0]
    with pytest.raises(RankFailed, match="in generation there are no later tokens"):
        ranks.run(1, printed, "generate", GenerateConfig(**settings, prompt="The "), timeout=LIMIT)


def test_rows_past_the_checkpoint_are_taken_again(
    corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path
) -> None:
    """As after a kill: metrics go on to step 14, the newest whole checkpoint is of step 10, its successor torn."""
    run_dir = tmp_path / "run"
    config = tiny_config(corpus, run_dir, stop_after=14)
    config.checkpoint = CheckpointConfig(every=5, keep=3)
    ranks.run(1, train, config, timeout=LIMIT)
    newest = run_dir / "checkpoints" / "step_00000014"
    shard = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert ranks.run(1, train, tiny_config(corpus, run_dir), timeout=LIMIT) == [0]
    assert trajectory(run_dir) == trajectory(undisturbed)
    log = (run_dir / "train.log").read_text()
    assert "step_00000014 is damaged" in log and "continuing from" in log and "step_00000010\n" in log


def test_a_longer_run_begins_with_the_same_batches(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """With a constant learning rate nothing but the batches could differ; the corpus is passed more than once."""
    losses = []
    for steps in (12, 30):
        config = tiny_config(corpus, tmp_path / str(steps), steps=steps)
        config.optim = OptimConfig(warmup_steps=0, schedule="constant")
        ranks.run(1, train, config, timeout=LIMIT)
        losses.append([row["loss"] for row in rows(tmp_path / str(steps))])
    assert losses[0] == losses[1][:12]


@pytest.mark.parametrize(("world", "degrees"), [(2, {}), (4, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True})])
def test_more_ranks_same_losses(
    world: int, degrees: dict[str, int], corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path
) -> None:
    config = with_layout(tiny_config(corpus, tmp_path / "run"), **degrees)
    assert ranks.run(world, train, config, timeout=LIMIT) == [0] * world
    expected = rows(undisturbed)
    got = rows(tmp_path / "run")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
    assert [r["dropped_fraction"] for r in got[:3]] == [r["dropped_fraction"] for r in expected[:3]]
    assert {r["world_size"] for r in got} == {world}
    # The end of a run too: held-out loss, and a sample that every layout draws alike.
    tail = (tmp_path / "run" / "train.log").read_text().split("held-out loss")[1]
    assert (
        tail.split("run directory")[0]
        == (undisturbed / "train.log").read_text().split("held-out loss")[2].split("run directory")[0]
    )


def test_kill_9_costs_only_the_steps_since_the_checkpoint(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = command_line(corpus, tmp_path / "run", "checkpoint.every=4", "checkpoint.keep=1")
    process = start(command)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000008")
    process.kill()
    process.communicate()
    assert len(rows(tmp_path / "run")) < 20
    again = start(command)
    output, errors = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, errors
    assert "continuing from" in output
    assert trajectory(tmp_path / "run") == trajectory(undisturbed)
    assert errors == ""  # nothing of the engine on the screen


def test_sigterm_writes_a_checkpoint_and_asks_to_be_requeued(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Two simulated ranks: the signal reaches the command alone, and both ranks stop after the same step."""
    command = command_line(corpus, tmp_path / "run", "train.steps=2000", "optim.schedule=constant")
    process = start(command, NPROC="2")
    wait_for(tmp_path / "run" / "metrics.jsonl", lines=3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, errors
    stopped_at = rows(tmp_path / "run")[-1]["step"]
    assert f"step_{stopped_at:08d}" in output and "SIGTERM" in output
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").is_file()


def wait_for(path: Path, lines: int = 0) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists() or (lines and path.read_text().count("\n") < lines):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_updates_that_are_not_finite_end_the_run(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: skipped, counted, named, then exit 1 and no checkpoint of it."""
    config = tiny_config(corpus, tmp_path / "run")
    config.optim = OptimConfig(lr=1e30, warmup_steps=0)
    config.guard = GuardConfig(max_skipped=3)
    config.checkpoint = CheckpointConfig(every=1)
    assert ranks.run(1, train, config, timeout=LIMIT) == [1]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "update skipped, not finite: gradient of " in log and "(4 in a row, 3 allowed)" in log
    skipped = [row for row in rows(tmp_path / "run") if row.get("skipped")]
    assert len(skipped) == 3 and all(row["grad_norm"] is None for row in skipped)
    assert {name for row in skipped for name in row["non_finite"]} >= {"grad_norm"}
    # Only the state before the first skipped update was kept.
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_directory_of_another_model_is_refused(
    corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path
) -> None:
    config = tiny_config(corpus, undisturbed)
    config.model.moe.num_experts = 2
    before = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    with pytest.raises(RankFailed, match=r"another model \(model.moe.num_experts: 4 -> 2\)"):
        ranks.run(1, train, config, timeout=LIMIT)
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == before
    config = tiny_config(corpus, undisturbed)
    config.optim.name = "muon"
    with pytest.raises(RankFailed, match=r"has the states of another optimizer \(optim.name: adamw -> muon\)"):
        ranks.run(1, train, config, timeout=LIMIT)
    config = tiny_config(corpus, undisturbed)
    config.checkpoint.resume = False
    with pytest.raises(RankFailed, match=r"checkpoint.resume is false"):
        ranks.run(1, train, config, timeout=LIMIT)


def test_weights_of_another_run_as_a_start(corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=1)
    config.checkpoint = CheckpointConfig(every=0, load=str(undisturbed))
    ranks.run(1, train, config, timeout=LIMIT)
    first = rows(tmp_path / "run")[0]
    assert first["step"] == 1 and first["loss"] < rows(undisturbed)[0]["loss"] - 1.0


def test_lines_every_few_steps_sum_up_the_routers_since(
    corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path
) -> None:
    """Also in the first line after a restart, which covers fewer steps."""
    first = tiny_config(corpus, tmp_path / "run", log_every=4, stop_after=6)
    ranks.run(1, train, first, timeout=LIMIT)
    ranks.run(1, train, tiny_config(corpus, tmp_path / "run", log_every=4), timeout=LIMIT)
    every = {row["step"]: row for row in rows(undisturbed)}
    lines = {row["step"]: row for row in rows(tmp_path / "run")}
    assert list(lines) == [4, 6, 8, 12, 16, 20]
    for begin, end in ((1, 4), (5, 6), (7, 8), (9, 12)):
        for key in ("aux_loss", "z_loss", "dropped_fraction", "router_entropy"):
            mean = sum(every[step][key] for step in range(begin, end + 1)) / (end - begin + 1)
            assert lines[end][key] == pytest.approx(mean, rel=1e-9), (key, end)
        assert lines[end]["loss"] == every[end]["loss"]


def test_a_trace_of_the_steps_asked_for(corpus: Path, ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", steps=4, profile=[2, 3])
    ranks.run(1, train, config, timeout=LIMIT)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "steps_2_to_3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    # Two steps of four micro-batches through two layers.
    assert sum(e["name"] == "aten::scaled_dot_product_attention" for e in events) == 2 * 4 * 2


def printed(world: World, command: str, settings: Any) -> str:
    """What `python -m launch.<command>` prints (rank function for the pool)."""
    main = importlib.import_module(f"launch.{command}").main
    before = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            assert main(settings) == 0
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return file.read().decode()


def test_evaluate_repeats_the_run_and_takes_own_text(ranks: RankPool, undisturbed: Path, tmp_path: Path) -> None:
    def text(checkpoint: Path, *files: Path) -> str:
        settings = EvaluateConfig(
            checkpoint=str(checkpoint), data=EvaluateDataConfig([str(f) for f in files]), precision="fp32"
        )
        return ranks.run(1, printed, "evaluate", settings, timeout=LIMIT)[0]

    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    final = json.loads(lines[-1])
    again = text(undisturbed)
    assert f"{final['val_loss']:.4f} nats/token" in again
    assert f"{final['val_bits_per_byte']:.3f}   gzip -9: " in again
    own = tmp_path / "own.txt"
    own.write_text("The cat sees a token. The dog takes the ball.")
    one = text(undisturbed / "checkpoints" / "step_00000010", own)
    assert "own.txt" in one and one != text(undisturbed / "checkpoints" / "step_00000020", own)
    with pytest.raises(RankFailed, match=r"missing\.txt does not exist"):
        text(undisturbed, tmp_path / "missing.txt")


def test_generate(ranks: RankPool, undisturbed: Path) -> None:
    def text(**settings: Any) -> str:
        config = GenerateConfig(checkpoint=str(undisturbed), precision="fp32", **settings)
        return ranks.run(1, printed, "generate", config, timeout=LIMIT)[0]

    greedy = text(prompt="The ", max_tokens=12, temperature=0.0)
    assert greedy.startswith("The ") and greedy == text(prompt="The ", max_tokens=12, temperature=0.0, seed=5)
    sampled = [text(prompt="The ", max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(RankFailed, match="temperature"):
        text(temperature=-1.0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.moe.top_k=9"], ["model.moe.top_k", "4"]),
        (["train.global_batch_size=7"], ["global_batch_size % (", "train.global_batch_size=6"]),
        (["data.files=[nowhere.txt]"], ["nowhere.txt does not exist"]),
        (["train.sequence_length=100000"], ["tokens to train on", "train.sequence_length="]),
        (["run.dir=/dev/null/run"], ["run.dir=/dev/null/run cannot be written"]),
        (["model.vocab_size=2"], ["vocab_size"]),
        (["precision=fp16"], ["precision", "bf16"]),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    overrides: list[str], told: list[str], corpus: Path, tmp_path: Path
) -> None:
    process = start(command_line(corpus, tmp_path / "run", *overrides))
    errors = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 2, errors
    assert errors.startswith("switchyard: error: ") and "Traceback" not in errors
    for part in told:
        assert part in errors
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_a_tokenizer_that_is_not_the_runs(corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path) -> None:
    """Other training text, other tokenizer: its ids would mean other text to the same embedding."""
    other = tmp_path / "other.txt"
    other.write_text("Completely different words make different merges. " * 200)
    config = tiny_config(corpus, undisturbed)
    data = replace(config.data, files=[str(other)], valid_files=[str(corpus)], valid_fraction=0.02)
    config = replace(config, data=data)
    before = (undisturbed / "config.yaml").read_text()
    with pytest.raises(RankFailed, match="not the one that this run was trained with"):
        ranks.run(1, train, config, timeout=LIMIT)
    assert (undisturbed / "config.yaml").read_text() == before


def test_checkpoints_written_while_training_goes_on(
    corpus: Path, ranks: RankPool, undisturbed: Path, tmp_path: Path
) -> None:
    """The same run, and a run from its checkpoint goes on as the first did."""
    config = tiny_config(corpus, tmp_path / "run", stop_after=15)
    config.eval.every = 10
    config.checkpoint = CheckpointConfig(every=3, keep=9, asynchronous=True)
    assert ranks.run(2, train, with_layout(config, ep=2), timeout=LIMIT) == [0, 0]
    steps = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == [f"step_{step:08d}" for step in (3, 6, 9, 12, 15)]
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("; training waited ") == 5
    config.train.stop_after, config.checkpoint.asynchronous = None, False
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    wanted, got = trajectory(undisturbed), trajectory(tmp_path / "run")
    assert [row[1] for row in got] == pytest.approx([row[1] for row in wanted], rel=1e-4)
