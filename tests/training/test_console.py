import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.printable import visible
from conf.schema import Config, RuntimeConfig
from moe.expert_load import ExpertLoad
from training import worker
from training.console import Console
from training.expert_load_log import load_lines

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step_row(step: int, **changed: Any) -> dict[str, Any]:
    row = {"step": step, "loss": 3.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.5, "mfu": None}
    row |= {"step_seconds": 2.0, "data_wait": 0.01}
    return row | {"dropped_fraction": 0.031, "load_max_over_mean": 1.5} | changed


def evaluation_row(bits: float | None = 1.5) -> dict[str, Any]:
    return {"step": 4, "val_loss": 2.0, "val_bits_per_byte": bits}


def expert_load(experts: int = 4) -> ExpertLoad:
    """Expert e of layer 1 is chosen e times; of layer 3 everything goes to expert 0."""
    load_LE = np.stack([np.arange(experts), np.eye(experts, dtype=int)[0] * 10])
    return ExpertLoad(
        [1, 3],
        load_LE,
        {
            "dropped_fraction": np.array([0.0, 0.25]),
            "unserved_fraction": np.zeros(2),
            "router_entropy": np.zeros(2),
            "router_logit_rms": np.ones(2),
            "aux_loss": np.ones(2),
            "z_loss": np.ones(2),
        },
    )


def whole_run(console: Console) -> None:
    console.start_table([("device", "CPU", "no CUDA " * 30), ("experts", "loop", "few")])
    console.progress("tokenise", 0.5)
    console.progress("tokenise", 1.0)
    for step in range(1, 5):
        console.step(step_row(step), 4)
    console.evaluation(evaluation_row())
    console.note("checkpoint " + "/long" * 40)
    console.warning("mind \x1b[2J the [bold]step[/bold] :smile:")
    console.summary(
        evaluation_row(),
        gzip_bits_per_byte=1.87649,
        load=expert_load(),
        sample=("def ", "f():\n\treturn\x1b[31m \u202e é"),
        paths=[("run directory", "/long" * 40)],
    )


def test_plain_output_has_no_control_characters_and_no_wrapped_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(stream=stream, log_path=tmp_path / "train.log") as console:
        whole_run(console)
    text = stream.getvalue()
    assert not re.search(r"[^\n\x20-\x7eé]", text)
    lines = text.splitlines()
    assert lines[0] == "device    CPU    " + ("no CUDA " * 30).rstrip()
    assert lines[1] == "experts   loop   few"
    assert "checkpoint " + "/long" * 40 in lines
    assert "warning: mind \\x1b[2J the [bold]step[/bold] :smile:" in lines
    assert "run directory   " + "/long" * 40 in lines
    assert not [line for line in lines if line != line.rstrip()]
    assert (tmp_path / "train.log").read_text() == text


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_the_start_table_is_whole_in_the_log(tmp_path: Path, stream_type: type[io.StringIO]) -> None:
    rows = [("device", "CPU", ""), ("norm", "torch", "equals"), ("run", "a", "new")]
    stream = stream_type()
    with Console(stream=stream, log_path=tmp_path / "train.log") as console:
        console.start_table(rows, {"run", "device"})
    assert "norm" not in stream.getvalue() and "device" in stream.getvalue() and "new" in stream.getvalue()
    log = ["device   CPU", "norm     torch   equals", "run      a       new", ""]
    assert (tmp_path / "train.log").read_text().splitlines() == log


@pytest.mark.parametrize(("verbose", "refused", "shown"), [(False, (), 3), (False, ("norm",), 4), (True, (), 5)])
def test_a_refused_faster_path_is_always_shown(verbose: bool, refused: tuple[str, ...], shown: int) -> None:
    config = Config(runtime=RuntimeConfig(verbose=verbose))
    table = [("device", "CPU", ""), ("norm", "torch", "native differs"), ("loss", "torch", "no copy")]
    built = SimpleNamespace(config=config, table=table, refused=frozenset(refused))
    run_dir = SimpleNamespace(path=Path("runs/a"), continued=False, changed=[])
    stream = io.StringIO()
    with Console(stream=stream) as console:
        worker._announce(console, built, run_dir, SimpleNamespace(train=[], valid=[], notes=[]))
    lines = stream.getvalue().rstrip().splitlines()
    assert len(lines) == shown and lines[0].startswith("device") and lines[-1].split() == ["run", "runs/a", "new"]
    assert ("native differs" in stream.getvalue()) == (verbose or bool(refused))


def test_summary_says_what_was_measured() -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        whole_run(console)
    text = stream.getvalue()
    assert "held-out loss   2.0000 nats/token\n" in text
    assert "perplexity      7.389\n" in text  # e squared
    assert "bits per byte   1.500   gzip -9: 1.876 bits/byte\n" in text
    assert "sample\n  def f():\n      return\\x1b[31m \\u202e é\n" in text


def test_unknown_bytes_leave_bits_per_byte_out() -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.evaluation(evaluation_row(bits=None))
        console.summary(evaluation_row(bits=None), gzip_bits_per_byte=None, load=None, sample=None, paths=[])
    assert stream.getvalue().splitlines()[0] == "step 4  held-out loss 2.0000  perplexity 7.389"
    assert "byte" not in stream.getvalue()


def test_diverged_losses_are_printed_rather_than_raised() -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.step(step_row(1, loss=float("nan"), grad_norm=float("inf"), skipped=1), 2)
        console.evaluation(evaluation_row() | {"val_loss": 5000.0})
    assert "loss     nan" in stream.getvalue() and "skipped 1" in stream.getvalue()
    assert "perplexity inf" in stream.getvalue()


def printed_steps(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"^step +(\d+)/", text, flags=re.MULTILINE)]


def test_a_log_file_stays_readable() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream=stream, clock=clock) as console:
        for step in range(1, 101):
            console.step(step_row(step), 100)
            clock.now += 0.25
    # The first, one every second, the last.
    assert printed_steps(stream.getvalue()) == [1, *range(5, 100, 4), 100]


def test_a_long_run_writes_fewer_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream=stream, clock=clock) as console:
        for step in range(1, 3 * 24 * 360 + 1):  # three days of steps of ten seconds
            console.step(step_row(step), 3 * 24 * 360)
            clock.now += 10
    steps = printed_steps(stream.getvalue())
    assert 4000 < len(steps) < 5000
    assert max(np.diff(steps)) == 6  # never more than a minute without a line


def test_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream=stream, clock=clock) as console:
        for step in (101, 111):  # continued at 100, logged every 10
            console.step(step_row(step), 1111)
            clock.now += 40
    # 10 steps took 40 s, 1000 are left: 4000 s.
    assert [line.split()[-2] for line in stream.getvalue().splitlines()] == ["-:--:--", "1:06:40"]


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_a_run_that_stops_early_shows_its_last_step_once(tmp_path: Path, stream_type: type[io.StringIO]) -> None:
    for seconds, expected in ((0.1, [1, 3]), (2.0, [1, 2, 3])):
        clock, log_path = Clock(), tmp_path / f"{seconds}.log"
        with Console(stream=stream_type(), log_path=log_path, clock=clock) as console:
            for step in (1, 2, 3):
                console.step(step_row(step), 100)
                clock.now += seconds
        assert printed_steps(log_path.read_text()) == expected


def test_stages_of_the_preparation() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream=stream, clock=clock) as console:
        for percent in range(0, 101, 10):
            console.progress("tokenise", percent / 100)
            clock.now += 0.5
        console.progress("index", 1.0)
    lines = stream.getvalue().splitlines()
    assert lines == [*(f"tokenise  {p}%  0:00:0{s}" for p, s in ((20, 1), (40, 2), (60, 3), (80, 4))), *lines[4:]]
    assert lines[4:] == ["tokenise: 5.0 s"]  # and nothing of a stage that nobody could notice


def test_a_terminal_keeps_one_progress_line_and_gets_its_cursor_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with pytest.raises(RuntimeError), Console(stream=stream, log_path=tmp_path / "train.log") as console:
        whole_run(console)
        console.step(step_row(7), 10)
        raise RuntimeError
    shown = stream.getvalue()
    assert "step 1/4" in shown and "━" in shown and "1,234 tokens/s" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > 0  # shown after it was last hidden
    # Nothing but colours, line erasure, cursor movement up and the cursor's own switch: the sample's escape is text.
    assert set(re.findall(r"\x1b\[[?0-9;]*([a-zA-Z])", shown)) <= set("mKAhl")
    assert "\x1b[2J" not in shown and "\\x1b[31m" in shown
    assert "\x1b" not in (tmp_path / "train.log").read_text()
    assert printed_steps((tmp_path / "train.log").read_text()) == [1, 4, 7]


def test_other_ranks_print_and_write_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with Console(rank=1, stream=stream, log_path=tmp_path / "train.log") as console:
        whole_run(console)
    assert stream.getvalue() == "" and list(tmp_path.iterdir()) == []


class Lost(Terminal):
    """Standard output whose reader is gone, or whose disk is full, after `room` characters."""

    def __init__(self, room: int, error: OSError, terminal: bool) -> None:
        super().__init__()
        self.room, self.error, self.terminal = room, error, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("room", [0, 300, 1000])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_goes_on_without_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, error: OSError, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    before = sys.stdout
    with Console(stream=io.StringIO(), log_path=tmp_path / "whole.log") as console:
        whole_run(console)
    stream = Lost(room, error, terminal)
    with Console(stream=stream, log_path=tmp_path / "train.log") as console:
        whole_run(console)
    lines = (tmp_path / "train.log").read_text().splitlines()
    said = [line for line in lines if line.startswith("standard output cannot be written any more")]
    assert len(said) == 1 and error.strerror in said[0]
    # whole_run takes no time worth a line, so the log is that of an undisturbed run.
    assert [line for line in lines if line != said[0]] == (tmp_path / "whole.log").read_text().splitlines()
    assert sys.stdout is before


def test_output_that_is_all_there_is_may_not_be_lost() -> None:
    with pytest.raises(BrokenPipeError):
        Console(stream=Lost(0, BrokenPipeError(32, "Broken pipe"), terminal=False)).note("held-out loss")
    Console(stream=Lost(0, BrokenPipeError(32, "Broken pipe"), terminal=False), may_lose_output=True).note("tokenising")


def test_progress_that_cannot_be_printed_is_no_error_of_the_one_at_work() -> None:
    """Who builds a cache would take a full output for a full disk of his own: the next answer raises it."""
    clock = iter(range(0, 1000, 50))
    console = Console(stream=Lost(0, OSError(28, "No space left on device"), False), clock=lambda: next(clock))
    for fraction in (0.1, 0.5, 1.0):
        console.progress("tokenising", fraction)
    with pytest.raises(OSError, match="No space left on device"):
        console.note("the run fits")


def test_a_log_that_cannot_be_written_is_reported_once() -> None:
    stream = io.StringIO()
    with Console(stream=stream, log_path=Path("/dev/full")) as console:
        whole_run(console)
    assert stream.getvalue().count("/dev/full cannot be written any more: No space left on device") == 1
    assert isinstance(console.log_error, OSError) and "bits per byte   1.500" in stream.getvalue()


def test_a_locale_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Console(stream=stream) as console:
        console.sample("", "é ∀ \ud800")
    assert raw.getvalue().decode("ascii").splitlines()[-1] == r"  \xe9 \u2200 \ud800"


def test_visible() -> None:
    assert visible("a\tb\r\nc\x07\x9b\u200b\u2028d é 漢") == "a   b\nc\\x07\\x9b\\u200b\\u2028d é 漢"


def test_load_of_few_experts() -> None:
    assert load_lines(expert_load(4), width=80)[1:] == [
        "layer    e0    e1    e2    e3   dropped",
        "    1   0.0  16.7  33.3  50.0      0.0%",
        "    3 100.0   0.0   0.0   0.0     25.0%",
    ]


def test_load_of_many_experts_fits() -> None:
    heading, *lines = load_lines(expert_load(128), width=80)
    assert heading == "expert load in percent (128 experts, balanced: 0.781)"
    # Layer 1: e/8128 for e from 0 to 127, median 63.5/8128.
    assert lines == [
        "layer    min  median    max  unused   busiest                           dropped",
        "    1   0.00    0.78   1.56       1   e127 1.56  e126 1.55  e125 1.54      0.0%",
        "    3   0.00    0.00 100.00     127   e0 100.00  e1 0.00  e2 0.00         25.0%",
    ]
    assert {len(line) for line in lines} == {79}


def test_warnings_and_records_go_to_the_log_and_output_to_the_screen(tmp_path: Path) -> None:
    script = f"""
        import logging, os, sys, warnings
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from training.console import Console
        from training.output_redirect import redirect_output
        log_path = Path({str(tmp_path / "train.log")!r})

        print("before")
        redirection = redirect_output(3)
        # As torch does on import: a handler of its own, and no word to the root.
        library = logging.getLogger("library")
        library.addHandler(logging.StreamHandler())
        library.propagate = False
        warnings.warn("early warning")
        logging.getLogger("engine").info("chatter of a rank other than 0")
        os.write(1, b"early C output\\n")
        print("early output")
        redirection.attach(log_path)
        warnings.warn("late warning")
        library.warning("library record")
        os.write(1, b"late C output\\n")
        with Console(log_path=log_path) as console:
            console.note("note")
        print("traceback", file=sys.stderr)
        redirection.undo()
        library.warning("library again")
        warnings.warn("after")
        os.write(1, b"after\\n")
        print("end")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.splitlines() == ["before", "early output", "note", "after", "end"]
    assert ran.stderr.splitlines()[:2] == ["traceback", "library again"]
    assert "UserWarning: after" in ran.stderr and "late" not in ran.stderr
    log = (tmp_path / "train.log").read_text()
    for said in ("early warning", "late warning", "library record"):
        (line,) = [line for line in log.splitlines() if said in line]
        assert " rank 3 WARNING " in line
    assert "early C output\n" in log and "late C output\n" in log and "note\n" in log
    assert "chatter" not in log and "early output" not in log


def test_a_failure_is_told_on_standard_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Once, and also where standard output is full."""
    with open("/dev/full", "w") as full:
        for rank in (0, 1):
            with Console(rank=rank, log_path=tmp_path / "log", stream=full) as console:
                console.failure("metrics.jsonl: \x1b[2J No space left")
    assert capsys.readouterr() == ("", "switchyard: error: metrics.jsonl: \\x1b[2J No space left\n")
    assert (tmp_path / "log").read_text() == "error: metrics.jsonl: \\x1b[2J No space left\n"
