"""What is decided between two attempts of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import Config
from corpus.prepare import prepare
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import ROOT, tiny_config, train, write_corpus
from training import environment, requeue
from training.requeue import (
    BAD_CONFIGURATION,
    DONE,
    FAILED,
    STOPPED,
    Ownership,
    Start,
    Verdict,
    describe_starts,
    read_attempts,
    record_attempt,
    record_start,
    write_stop,
)
from training.signals import StopRequest
from training.worker import train_rank


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Run":
    return Run(tmp_path, monkeypatch)


class Run:
    """A run directory in which attempts begin and end."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.monkeypatch = path, monkeypatch

    def attempt(self, restart: int, *, step: int, checkpoint: int = 0, code: int | None = None) -> None:
        """An attempt that takes steps, keeps a checkpoint, and says how it ended (None: it was killed)."""
        self.monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        Ownership(self.path)
        with (self.path / "metrics.jsonl").open("w") as rows:
            rows.writelines(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, step + 1))
            rows.write('{"step": 9')  # what a kill leaves
        if checkpoint:
            (self.path / "checkpoints" / f"step_{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
        if code is not None:
            write_stop(self.path, code=code, reason="because")

    def end(self, *, stop_requested: bool = False, limit: int | None = 5) -> tuple[bool, int, str]:
        verdict = record_attempt(self.path, stop_requested=stop_requested, max_requeues=limit)
        return verdict.requeue, verdict.code, verdict.message

    def die(self, restart: int, node: str, *, step: int = 7, nodes: str = "abcd", down: str = "") -> Verdict:
        """An attempt with a rank on each of some nodes, of which the one on `node` is killed."""
        self.attempt(restart, step=step)
        start = Start(f"7.{restart}", list(nodes), len(nodes), f"dp{len(nodes)}", {})
        record_start(self.path, start, list(down))
        return record_attempt(
            self.path,
            stop_requested=False,
            max_requeues=9,
            errors=f"srun: error: {node}: task {nodes.find(node)}: Killed",
        )


def test_a_run_that_is_done_or_wrong_is_not_requeued(run: Run) -> None:
    run.attempt(0, step=20, checkpoint=20, code=DONE)
    assert run.end()[:2] == (False, 0)
    for code in (FAILED, BAD_CONFIGURATION):
        run.attempt(0, step=3, code=code)
        again, exit_code, message = run.end()
        assert (again, exit_code) == (False, code) and "failed after step 3: because" in message


def test_a_stopped_run_is_requeued_up_to_the_limit(run: Run) -> None:
    for restart in range(3):
        run.attempt(restart, step=5, checkpoint=5, code=STOPPED)
        assert run.end(limit=3)[0], "stopping at one step, as when preempted at once, is no failure"
    run.attempt(3, step=6, checkpoint=6, code=STOPPED)
    again, code, message = run.end(limit=3)
    assert (again, code) == (False, STOPPED) and "slurm.max_requeues=3" in message
    assert [attempt.end for attempt in read_attempts(run.path)] == ["stopped"] * 4
    assert run.end(limit=None)[0] is False  # where a person is there, nothing is requeued


def test_dying_twice_at_one_step_is_the_end(run: Run) -> None:
    run.attempt(0, step=7, checkpoint=5)
    assert run.end()[:2] == (True, FAILED)
    run.attempt(1, step=7, checkpoint=5)
    again, code, message = run.end()
    assert (again, code) == (False, FAILED) and "without a checkpoint newer than step 5" in message


@pytest.mark.parametrize(("step", "checkpoint"), [(8, 5), (7, 6)])
def test_dying_twice_elsewhere_is_not(run: Run, step: int, checkpoint: int) -> None:
    run.attempt(0, step=7, checkpoint=5)
    run.end()
    run.attempt(1, step=step, checkpoint=checkpoint)
    assert run.end()[0]


def test_a_life_between_that_stopped_begins_the_count_again(run: Run) -> None:
    for restart, code in enumerate((None, STOPPED, None)):
        run.attempt(restart, step=7, checkpoint=5, code=code)
        assert run.end()[0]


def test_a_node_on_which_a_run_dies_twice_is_excluded(run: Run) -> None:
    """Even if it has died at one step twice: the node may be why."""
    assert run.die(0, "c").exclude == ()
    second = run.die(1, "c")
    assert second.requeue and second.exclude == ("c",) and "on c" in second.message
    third = run.die(2, "a", nodes="abd", step=8)
    assert third.requeue and third.exclude == ("c",)
    fourth = run.die(3, "a", nodes="abd", step=8)
    assert fourth.requeue and set(fourth.exclude) == {"a", "c"}
    # Without c and a, b dies at the same step as before: it is not the nodes.
    assert run.die(4, "b", nodes="bd", step=8).requeue is False
    assert describe_starts(run.path) == (
        "4 nodes in attempts 1 to 2, 3 in attempts 3 to 4, 2 in attempt 5",
        "dp4, then dp3, then dp2",
    )


def test_an_excluded_node_that_comes_back_does_not_requeue_for_ever(run: Run) -> None:
    """As when the others were needed, so that Slurm was not asked to leave it out."""
    assert [run.die(restart, "c").requeue for restart in range(3)] == [True, True, False]


def test_a_node_that_slurm_gives_up_counts(run: Run) -> None:
    """Its attempt had no end: the batch script was lost, too."""
    run.attempt(0, step=5, checkpoint=4)
    record_start(run.path, Start("7.0", list("abcd"), 4, "dp4", {}))
    verdict = run.die(1, "b", nodes="abd", step=9, down="cx")
    (lost, _) = read_attempts(run.path)
    assert (lost.attempt, lost.end, lost.step, lost.failed_nodes) == ("7.0", "lost", 9, ["c"])
    assert verdict.exclude == ()
    assert run.die(2, "c", step=11).exclude == ("c",)


def test_never_in_time_is_the_end_too(run: Run) -> None:
    """Asked to stop, twice, and no checkpoint either time: the third would not be quicker."""
    run.attempt(0, step=4)
    again, _, message = run.end(stop_requested=True)
    assert again and "send the signal earlier" in message
    run.attempt(1, step=6)
    assert run.end(stop_requested=True)[0] is False


def test_the_stop_file_of_an_earlier_attempt_does_not_count(run: Run) -> None:
    run.attempt(0, step=7, checkpoint=5, code=DONE)
    stop = (run.path / "stop.json").read_text()
    run.attempt(1, step=8, checkpoint=5)
    assert not (run.path / "stop.json").exists()
    (run.path / "stop.json").write_text(stop)  # as if the earlier rank 0 had been late
    assert run.end()[2].startswith("died after step 8")


TORN = [b'{"life": "7.0", "end": "di', b"\xff\xfe", b"[]", b"null", b'{"life": "7.0"}', b"[" * 100_000]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_or_foreign_line_is_passed_over(run: Run, torn: bytes) -> None:
    """As a kill or another version leaves it, in either file; the next line is not glued to it."""
    run.attempt(0, step=7, checkpoint=5)
    run.end()
    with (run.path / "lives.jsonl").open("ab") as file:
        file.write(b'{"life": "7.0", "end": "died", "step": 7, "checkpoint": 5, "reason": "", "new": 1}\n' + torn)
    run.attempt(1, step=8, checkpoint=8)
    (run.path / "stop.json").write_bytes(torn)
    again, _, message = run.end()
    assert again and message.startswith("died after step 8")
    assert [(attempt.step, attempt.end) for attempt in read_attempts(run.path)] == [(7, "died")] * 2 + [(8, "died")]


def test_the_verdict_needs_no_readable_settings(run: Run) -> None:
    for content in (b"slurm: {max_requeues: 3}\nnewer: {setting: 1}\n", b"\xff\xfe", b"slurm: 3", b""):
        run.attempt(4, step=7, checkpoint=7, code=STOPPED)
        (run.path / "config.yaml").write_bytes(content)
        command = [sys.executable, "-m", "launch.verdict", str(run.path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "75\n" if b"newer" in content else "requeue\n"), done.stderr


def test_a_name_that_is_no_step_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("step_00000007", "step_damaged_", "step_00000009.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert requeue.newest_checkpoint(tmp_path) == 7


def test_the_later_owner_holds_the_directory(tmp_path: Path) -> None:
    first = Ownership(tmp_path)
    assert first.holds()
    second = Ownership(tmp_path)
    assert second.holds() and not first.holds()
    (tmp_path / "owner").unlink()
    assert first.holds()  # a file system that hesitates


def taken_over(world: World, config: Config) -> int:
    """A run whose directory another process takes over during step 3 (rank function for the pool)."""
    holds, calls = Ownership.holds, []

    def counted(owner: Ownership) -> bool:
        calls.append(owner)
        if len(calls) == 3:
            Ownership(Path(config.run.dir))
        return holds(owner)

    Ownership.holds = counted
    try:
        return train(world, config)
    finally:
        Ownership.holds = holds


def test_a_run_that_was_taken_over_ends_without_writing(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    config.checkpoint.every = 3
    assert ranks.run(2, taken_over, config, timeout=120) == [FAILED] * 2
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "stop.json").exists()
    assert "another process has taken over" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_says_how_it_ended(ranks: RankPool, tmp_path: Path) -> None:
    """A signal that came while the engine was being imported stops it before the first step."""
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run", steps=2)
    assert ranks.run(2, train_after_a_signal, config, timeout=120) == [STOPPED] * 2
    told = json.loads((tmp_path / "run" / "stop.json").read_text())
    assert (told["code"], requeue.newest_checkpoint(tmp_path / "run"), requeue.last_step(tmp_path / "run")) == (
        75,
        0,
        0,
    )
    assert ranks.run(2, train, config, timeout=120) == [DONE] * 2
    assert json.loads((tmp_path / "run" / "stop.json").read_text())["reason"] == "all steps are taken"
    kept = (tmp_path / "run" / "environment.jsonl").read_text().splitlines()
    assert len(kept) == 2 and "torch" in json.loads(kept[1])["versions"]


def train_after_a_signal(world: World, config: Config) -> int:
    """Rank 1 alone was told (rank function for the pool)."""
    prepared = prepare(config.data, vocab_size=config.model.vocab_size, sequence_length=config.train.sequence_length)
    stop = StopRequest((), received="SIGUSR1" if world.rank == 1 else None)
    return train_rank(world, config, None, prepared, stop=stop)


def test_only_what_is_known_to_be_harmless_is_kept_of_the_environment() -> None:
    harmless = {"NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "3", "LOADEDMODULES": "cuda/12"}
    kept = environment.describe(harmless | {"WANDB_API_KEY": "k", "SLURM_JWT": "k"})["variables"]
    assert kept == harmless


def test_life_without_slurm_has_no_name() -> None:
    assert requeue.attempt_id({}) == "" and requeue.attempt_id({"SLURM_JOB_ID": "3"}) == "3.0"


def test_last_step_of_a_long_file(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as rows:
        rows.writelines(json.dumps({"step": s, "loss": "x" * 400}) + "\n" for s in range(1, 1001))
    assert requeue.last_step(tmp_path) == 1000
    assert requeue.last_step(tmp_path / "nothing") == 0


def test_attempts_of_earlier_versions_count(run: Run) -> None:
    """lives.jsonl was their file, and `life` the name of an attempt."""
    line = {"life": "7.0", "end": "died", "step": 7, "checkpoint": 5, "reason": ""}
    (run.path / "lives.jsonl").write_text(json.dumps(line) + "\n")
    run.attempt(1, step=7, checkpoint=5)
    again, _, message = run.end()
    assert not again and "The previous attempt ended in the same way" in message
    assert [(attempt.attempt, attempt.step) for attempt in read_attempts(run.path)] == [("7.0", 7), ("7.1", 7)]
