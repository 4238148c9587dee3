"""Signals that ask a run to stop, sent to real processes at every stage of their lives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.training.helpers import command_line, rows, start, write_corpus
from training.signals import FAIL, GO_ON, LEAVE, STOP, EndedEarly, StopRequest

LIMIT = 120.0


def wait_until(condition: Callable[[], object], what: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def pending(pid: int) -> bool:
    """Whether a signal was sent to the process that has not reached it yet."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd"))
    return int(mask.split()[1], 16) != 0


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=LIMIT)
    assert "Traceback" not in output + errors, errors
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_signal_is_remembered() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.state() == GO_ON
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.state() == STOP and stop.received == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)  # asked already: nothing more
        assert stop.received == "SIGUSR1"
        with pytest.raises(EndedEarly, match="SIGUSR1"), stop.preparing(lambda: None):
            pass
    assert signal.getsignal(signal.SIGUSR1) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_to_leave_goes_before_to_fail_and_that_before_to_stop() -> None:
    stop = StopRequest((), received="SIGUSR1")
    assert stop.state() == STOP and stop.state(fail=True) == FAIL
    assert stop.state(fail=True, leave=True) == LEAVE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_before_anything_is_imported(number: signal.Signals, code: int, corpus: Path, tmp_path: Path) -> None:
    """The handler is there before the packages are: whoever waits for it can send the signal then."""
    process = start(command_line(corpus, tmp_path / "run"))
    wait_until(lambda: catches(process.pid, signal.SIGUSR1), "a handler", process)
    imported = Path(f"/proc/{process.pid}/maps").read_text()
    assert "numpy" not in imported and "yaml" not in imported
    process.send_signal(number)
    assert end_of(process) == (code, "", f"switchyard: stopped by {number.name} before the first step\n")
    assert not (tmp_path / "run").exists()


SLOW_DATA = """
import sys, time
from pathlib import Path
from corpus import text
documents, mark, poll = text.read_documents, Path(sys.argv.pop(1)), sys.argv.pop(1) == "between"
def endless(*args, **settings):
    while True:
        for document in documents(*args, **settings):
            mark.touch()
            time.sleep(0.01 if poll else 600)
            yield document
text.read_documents = endless
import runpy
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("at", ["between", "within"])
def test_data_preparation_ends_promptly(at: str, corpus: Path, tmp_path: Path) -> None:
    """Between two documents, and within a piece of work that asks nobody; nothing is left of either."""
    mark, cache = tmp_path / "mark", tmp_path / "cache"
    command = [sys.executable, "-c", SLOW_DATA, str(mark), at]
    command += command_line(corpus, tmp_path / "run", f"data.cache_dir={cache}")[3:]
    process = start(command)
    wait_until(mark.exists, "the first document", process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert end_of(process) == (130, "", "switchyard: stopped by SIGINT before the first step\n")
    assert time.monotonic() - sent < 30  # 5 s where the machine is idle
    assert not (tmp_path / "run").exists()
    assert not list(cache.glob("*/*/manifest.json"))


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_while_the_fork_server_starts(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    """As scancel does, to every process that there is: no rank exists yet, and each of them stops before a step."""
    process = start(command_line(corpus, tmp_path / "run", "train.steps=100000"), NPROC="2")
    wait_until(lambda: any("forkserver" in " ".join(p.cmdline()) for p in children(process)), "a fork server", process)
    for one in [*children(process), psutil.Process(process.pid)]:
        one.send_signal(number)
    code, output, _ = end_of(process)
    assert code == 75 and f"stopped by {number.name} after step 0" in output
    assert (tmp_path / "run" / "checkpoints" / "step_00000000" / "manifest.json").is_file()


SLOW_CHECKPOINT = """
import sys, time
from pathlib import Path
from parallel import checkpoint_writer
mark = Path(sys.argv.pop(1))
write = checkpoint_writer.write_tensors
def slow(path, *args):
    if "step_00000006" in str(path):
        mark.touch()
        time.sleep(600)
    return write(path, *args)
checkpoint_writer.write_tensors = slow
import runpy
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def test_a_second_ctrl_c_within_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    settings = command_line(corpus, run, "train.steps=100000", "checkpoint.every=3")[3:]
    process = start([sys.executable, "-c", SLOW_CHECKPOINT, str(mark), *settings])
    wait_until(mark.exists, "a second checkpoint", process)
    for _ in range(2):
        wait_until(lambda: not pending(process.pid), "delivery", process)
        process.send_signal(signal.SIGINT)
    code, _, errors = end_of(process)
    assert code == 130 and errors.startswith("switchyard: interrupted again") and errors.count("\n") == 1
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_a_second_ctrl_c_ends_simulated_ranks(corpus: Path, tmp_path: Path) -> None:
    process = start(command_line(corpus, tmp_path / "run", "train.steps=100000"), NPROC="2")
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and rows(tmp_path / "run"), "a step", process)
    ranks = [one for one in children(process) if one.ppid() != process.pid]  # they belong to the fork server
    assert len(ranks) == 2
    for one in ranks:
        one.suspend()  # so that the first Ctrl-C cannot be obeyed
    for _ in range(2):
        wait_until(lambda: not pending(process.pid), "delivery", process)
        process.send_signal(signal.SIGINT)
    code, _, errors = end_of(process)
    assert code == 130 and errors.startswith("switchyard: interrupted again") and errors.count("\n") == 1
    assert not psutil.wait_procs(ranks, timeout=30)[1]
