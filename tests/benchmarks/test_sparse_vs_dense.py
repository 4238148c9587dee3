"""The study of sparse against dense models: its figures from rows made by hand, its folder of runs, and one small study
from the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sparse_vs_dense import __main__ as command
from benchmarks.sparse_vs_dense import analysis, report, runs
from benchmarks.sparse_vs_dense.inference import nearest
from benchmarks.sparse_vs_dense.runs import Job, Study, affordable_steps, grid, sparse, twin, wide
from benchmarks.sparse_vs_dense.speedup import (
    held_out_curve,
    interval,
    over_seeds,
    ratio,
    speedups,
    training_curve,
    trend,
)
from tests.training.helpers import ROOT, write_corpus

TOKENS = 100  # per step
FLOPS = 10.0  # per token


def rows(loss: Any, steps: int = 40, seconds: float = 2.0, every: int = 10) -> list[dict[str, Any]]:
    """metrics.jsonl of a run whose loss is a function of the step, with a held-out loss 0.5 above it."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append({"step": step, "loss": loss(step), "tokens": TOKENS * step, "step_seconds": seconds})
        if step % every == 0:
            found.append({"step": step, "val_loss": loss(step) + 0.5, "val_bits_per_byte": 1.0})
    return found


def slow(step: float) -> float:
    return 10 - 0.1 * step


def fast(step: float) -> float:
    """What `slow` is at twice the step."""
    return 10 - 0.2 * step


def test_steps_to_equal_loss() -> None:
    """On straight lines a mean of steps is the loss at their middle, so that smoothing moves nothing."""
    for window in (1, 2, 5):
        dense, mine = (training_curve(rows(loss), FLOPS, window) for loss in (slow, fast))
        assert dense.reach(8.05) == pytest.approx(19.5)
        assert mine.reach(8.05) == pytest.approx(9.75)
        assert ratio(dense, mine, 8.05) == pytest.approx(2.0)
        assert mine.reach(8.05, "flops") == pytest.approx(9.75 * TOKENS * FLOPS)
        assert mine.reach(8.05, "seconds") == pytest.approx(9.75 * 2.0)


def test_a_loss_that_is_not_reached_has_no_ratio() -> None:
    dense, mine = training_curve(rows(slow), FLOPS, 1), training_curve(rows(fast), FLOPS, 1)
    assert ratio(dense, mine, 1.0) is None  # the dense one ends at 6
    assert ratio(mine, dense, 3.0) is None
    assert math.isinf(training_curve(rows(lambda step: None if step == 1 else 5.0, every=99), FLOPS, 2).loss[0])


def test_the_first_step_below_a_level_counts() -> None:
    losses = [5.0, 3.0, 4.0, 2.0]
    curve = training_curve(rows(lambda step: losses[step - 1], steps=4), FLOPS, 1)
    assert curve.reach(3.5) == pytest.approx(1.75)


def test_held_out_losses_are_interpolated_between_evaluations() -> None:
    dense, mine = held_out_curve(rows(slow), FLOPS), held_out_curve(rows(fast), FLOPS)
    assert list(dense.steps) == [10, 20, 30, 40] and list(dense.seconds) == [20, 40, 60, 80]
    assert ratio(dense, mine, 7.5) == pytest.approx(30 / 15)


def test_speedups_of_seeds_with_known_answers() -> None:
    """Seeds of 2 and of 4 times: a geometric mean of the root of 8. Twice the seconds per step halve it in seconds."""
    dense = [training_curve(rows(slow, steps=80), FLOPS, 1)] * 2
    others = [training_curve(rows(lambda s, k=k: 10 - 0.1 * k * s, steps=80, seconds=4.0), FLOPS, 1) for k in (2, 4)]
    found = speedups(dense, others)
    final = found["final"]
    assert final["loss"] == pytest.approx(2.0)
    assert final["steps"]["of_seeds"] == pytest.approx([2.0, 4.0])
    assert final["steps"]["speedup"] == pytest.approx(8**0.5)
    assert final["seconds"]["speedup"] == pytest.approx(8**0.5 / 2)
    assert final["steps"]["interval"] == pytest.approx([2.0, 4.0])
    assert [level["loss"] for level in found["levels"]] == pytest.approx([8.0, 6.0, 4.0])
    assert [level["steps"]["speedup"] for level in found["levels"]] == pytest.approx([8**0.5] * 3)


def test_a_single_seed_has_no_interval_and_a_missing_one_no_mean() -> None:
    assert over_seeds([2.0])["interval"] is None and over_seeds([2.0])["speedup"] == 2.0
    assert over_seeds([2.0, None]) == {"speedup": None, "interval": None, "of_seeds": [2.0, None], "not_reached": 1}


def test_bootstrap_interval_is_that_of_a_mean() -> None:
    """Beside the normal distribution's: a mean of 400 values has a standard error of a twentieth of theirs."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = interval(list(values), lambda x: float(x.mean())) or (0, 0)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_trend_over_experts() -> None:
    """1 + 0.5 log2 E reaches 4 at E = 64; with seeds of 0.4 and 0.6 between 2^5 and 2^7.5."""
    exact = trend({experts: [1 + 0.5 * math.log2(experts)] for experts in (2, 8, 16)})
    assert exact is not None and exact["per_doubling_interval"] is None
    assert exact["per_doubling"] == pytest.approx(0.5) and exact["experts_at_target"] == pytest.approx(64)
    two = trend({experts: [1 + b * math.log2(experts) for b in (0.4, 0.6)] for experts in (2, 8, 16)})
    assert two is not None and two["per_doubling"] == pytest.approx(0.5)
    assert two["per_doubling_interval"] == pytest.approx([0.4, 0.6])
    assert two["experts_at_target_interval"] == pytest.approx([2**5, 2**7.5])


def test_trend_leaves_out_what_did_not_reach_the_loss_and_says_so() -> None:
    assert trend({2: [None], 4: [1.5]}) is None
    found = trend({2: [None, 1.0], 4: [1.5, 1.4], 8: [1.4, 1.3]})
    assert found is not None and found["left_out"] == [2] and found["experts"] == [4, 8]
    assert found["experts_at_target"] is None and found["experts_at_target_interval"] == [None, None]
    said = report.trend_text(found | {"parameters_at_target": None}, "training loss")
    assert "E = 2 did not reach" in said and "does not reach 4x" in said


def test_extrapolation_is_called_so() -> None:
    fitted = trend({experts: [1 + 0.5 * math.log2(experts)] for experts in (2, 8)})
    assert fitted is not None
    said = report.trend_text(fitted | {"parameters_at_target": 54e6}, "training loss")
    assert "4x at E = 64, 54 M parameters; this is an extrapolation beyond the measured 8" in said


def test_models_have_equal_arithmetic_and_equal_parameters() -> None:
    dense, hidden, sparse_layers = twin().cost(), twin().config().model.hidden_size, 2
    for experts in (2, 64):  # beside the router's product, forward and twice backward
        router = 3 * 2 * hidden * experts * sparse_layers
        assert sparse(experts).cost().flops_per_token == dense.flops_per_token + router
    large, same = sparse(8).cost(), wide(8).cost()
    assert same.total == pytest.approx(large.total, rel=0.001)
    assert same.flops_per_token > 2 * large.flops_per_token
    small = ["model.hidden_size=32", "model.ffn_hidden_size=48"]  # which do not change the wider model's width
    assert wide(4, small).cost(small).total == pytest.approx(sparse(4).cost(small).total, rel=0.05)


def test_runs_of_a_seed_differ_in_the_model_alone(tmp_path: Path) -> None:
    study = Study(100, "/text.jsonl", ("optim.lr=1e-3",))
    jobs = list(grid([twin(), sparse(4)], [8, 16], 2))
    assert [job.name for job in jobs[:3]] == ["dense-b8-s1", "e4-b8-s1", "dense-b16-s1"]
    dense, mine = (set(study.command(job, tmp_path)) for job in jobs[:2])
    own = {"model=tiny_dense", "model=tiny_switch", "model.moe.num_experts=4", "model.moe.top_k=1"}
    assert dense ^ mine == own
    assert {"train.seed=1", "train.global_batch_size=8", "optim.lr=1e-3", "optim.schedule=constant"} < dense


def test_affordable_steps() -> None:
    """Two runs of 1 and 3 seconds a step at 256 sequences: an evaluation of a step's third, 10 of them, and 50 seconds
    of everything else leave 1000 - 4 / 3 * 10 - 50 seconds for the steps."""
    assert affordable_steps([(1.0, 20.0, 256), (3.0, 30.0, 256)], 1000.0) == 230
    with pytest.raises(ValueError, match="--minutes 2, or fewer"):
        affordable_steps([(1.0, 20.0, 256), (3.0, 30.0, 256)], 60.0)


def write_run(folder: Path, found: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, started = Study(40, ""), []

    def fake(line: list[str]) -> float:
        run_dir = Path(next(word for word in line if word.startswith("run.dir=")).removeprefix("run.dir="))
        started.append(run_dir.name)
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        if not run_dir.exists():
            (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(slow)))
        return 1.0

    monkeypatch.setattr(runs, "launch", fake)
    write_run(tmp_path / "runs" / "e2-b8-s1", rows(fast))
    write_run(tmp_path / "runs" / "e4-b8-s1", rows(fast)[:20])  # interrupted
    for _ in range(2):
        for job in [*grid([sparse(2), sparse(4)], [8], 1), Job(twin(), 8, 2)]:
            assert runs.ensure(study, job, tmp_path)[-1]["step"] == 40
    assert started == ["e4-b8-s1", "dense-b8-s2"]
    assert not (tmp_path / "runs" / "dense-b8-s2" / "checkpoints").exists()


def test_a_folder_keeps_one_study(tmp_path: Path) -> None:
    study = Study(40, "/a.jsonl", ("optim.lr=1e-3",))
    study.open(tmp_path)
    study.open(tmp_path)
    assert runs.read(tmp_path) == study
    with pytest.raises(ValueError, match=r"runs with steps 40, not 50\. Nearest: another --out"):
        replace(study, steps=50).open(tmp_path)


def test_analysis_of_a_folder(tmp_path: Path) -> None:
    """Two seeds of a dense model, of one that is twice as fast and of one of which a seed is missing."""
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"dense-b8-s{seed}", rows(slow))
        write_run(tmp_path / "runs" / f"e2-b8-s{seed}", rows(fast))
    write_run(tmp_path / "runs" / "e4-b8-s1", rows(lambda s: 10 - 0.4 * s))
    write_run(tmp_path / "runs" / "wide4-b8-s1", rows(lambda s: 10 - 0.4 * s))
    models = [twin(), wide(4), sparse(2), sparse(4)]
    found = analysis.analyse(Study(40, ""), models, [8, 16], 2, tmp_path, window=2)
    assert list(found["batches"]) == ["8"]
    of = found["batches"]["8"]["models"]
    assert of["e2"]["difference"] == pytest.approx(-4.0) and of["e2"]["seeds"] == [1, 2]
    assert of["e2"]["speedup"]["final"]["steps"]["speedup"] == pytest.approx(2.0)
    assert of["e2"]["speedup_by_held_out"]["steps"]["speedup"] == pytest.approx(2.0)
    assert of["e4"]["seeds"] == [1] and of["e4"]["speedup"]["final"]["steps"]["interval"] is None
    assert found["batches"]["8"]["trend"]["per_doubling"] == pytest.approx(2.0)
    equal = found["batches"]["8"]["against_equal_parameters"]["e4"]
    flops = found["models"]
    assert equal["steps"]["speedup"] == pytest.approx(1.0)
    factor = flops["wide4"]["flops_per_token"] / flops["e4"]["flops_per_token"]
    assert equal["flops"]["speedup"] == pytest.approx(factor)
    found |= {"corpus_line": "corpus", "machine": "machine", "command": "python -m benchmarks.sparse_vs_dense"}
    shown = report.text(found)
    assert "2.00 [2.00, 2.00]" in shown and "95 % of bootstrap samples of 2 pairs" in shown
    document = tmp_path / "page.md"
    document.write_text("Before\n<!-- study: figures -->\nold\n<!-- end -->\nafter\n")
    report.write_docs(found, document)
    written = document.read_text()
    assert written.startswith("Before\n<!-- study: figures -->\n") and written.endswith("<!-- end -->\nafter\n")
    assert "old" not in written and "| 2 experts," in written
    report.write_docs(found, document)
    assert document.read_text() == written
    document.write_text("none")
    with pytest.raises(ValueError, match="has no <!-- study"):
        report.write_docs(found, document)


def test_the_document_has_the_block() -> None:
    assert report.MARK.search(report.DOCUMENT.read_text())


def test_dense_model_of_nearest_loss() -> None:
    assert nearest(3.1, {"dense": 3.3, "wide8": 3.0}) == "wide8"


def test_wrong_arguments_end_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--experts", "1"], "at least 2 experts; nearest: 2"),
        (["--seeds", "0"], "nearest: --seeds 1"),
        (["--report"], "has no study; nearest: the command without --report"),
    ):
        assert command.main([*given, "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err


def test_a_small_study(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models for a few steps, then again without training, with the same result."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=320"]
    settings += ["train.sequence_length=32", "train.micro_batch_size=8", "eval.batches=1", "eval.final_batches=1"]
    settings += ["precision=fp32", f"data.cache_dir={tmp_path}/cache", "optim.warmup_steps=2"]
    size = ["--experts", "2", "--equal-parameters", "--seeds", "1", "--batch", "8", "--out", str(tmp_path / "out")]
    size += ["--at-once", "2"]
    given = [*size, "--corpus", str(write_corpus(tmp_path)), "--json", "--steps", "6", *settings]
    assert command.main(given) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    of = result["batches"]["8"]["models"]
    assert list(of) == ["dense", "e2"]
    assert of["e2"]["held_out_curve"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert of["e2"]["held_out"] < of["e2"]["held_out_curve"]["loss"][0]
    assert of["dense"]["training_curve"]["flops"][-1] == pytest.approx(
        6 * 8 * 32 * result["models"]["dense"]["flops_per_token"]
    )
    monkeypatch.setattr(runs.subprocess, "run", lambda *a, **b: pytest.fail("trained again"))
    assert command.main(given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert command.main([*given, "--steps", "7"]) == 2
    assert "runs with steps 6, not 7" in capsys.readouterr().err
    assert command.main([*(word for word in given if word not in ("--steps", "6")), "optim.lr=1"]) == 2
