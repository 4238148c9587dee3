"""Console output of a run, also written to train.log. Shapes: L sparse layers, E experts."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np

from conf.printable import visible
from moe.expert_load import ExpertLoad
from training.expert_load_log import load_lines
from training.metrics import Row
from training.output_redirect import discard_output

if TYPE_CHECKING:  # rich is imported where it is used: ranks that print nothing do not need it
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_PLAIN_WIDTH = 120  # columns of the expert load table without a terminal
_NOTICEABLE_SECONDS = 0.5  # shorter stages of the preparation are not printed
_REFRESH_SECONDS = 0.1  # between two updates of the progress line


class Console:
    """Prints the output of a run. On a terminal a progress line stays at the bottom and everything else scrolls above
    it. Otherwise, and in train.log, there are plain lines without control characters or wrapping.

    If standard output cannot be written any more (closed pipe, full disk), it is abandoned; this is an error only
    without `log_path` and `may_lose_output`. `log_error` is the error with which train.log could not be written.

    Every rank may call every method; ranks other than 0 print nothing. Use it as a context manager: leaving it removes
    the progress line and restores the cursor.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        log_path: Path | None = None,
        may_lose_output: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log_path`: train.log, appended to; None: no log. `may_lose_output`: losing standard output is not an error.
        `stream`: None: standard output. `clock`: seconds. Create it after `redirect_output`, which replaces sys.stdout.

        Raises:
            OSError: train.log cannot be opened.
        """
        self.log_error: OSError | None = None
        self._output_error: OSError | None = None  # of a progress line
        self._may_lose_output = may_lose_output or log_path is not None
        self._terminal: RichConsole | None = None
        self._stream: TextIO | None = None  # standard output; None: not rank 0, or abandoned
        self._log_file: TextIO | None = None
        self._live: Live | None = None
        self._drawn = float("-inf")
        self._clock = clock
        self._pace = _Pace(clock)
        self._stage: tuple[str, float] | None = None  # name and start of the stage that `progress` shows
        self._first: tuple[int, float] | None = None  # step and time of the first row
        self._last_step: tuple[Text, bool] | None = None  # its line, and whether it was written as a plain line
        self._is_main = rank == 0
        if self._is_main:
            self._open(stream or sys.stdout, log_path)

    def _open(self, stream: TextIO, log_path: Path | None) -> None:
        from rich.console import Console as RichConsole

        class Terminal(RichConsole):
            def on_broken_pipe(self) -> None:
                raise  # the current BrokenPipeError; rich would end the process

        self._stream = stream
        if hasattr(stream, "reconfigure"):
            # A sample may contain characters that the job's locale cannot encode.
            stream.reconfigure(errors="backslashreplace")
        literal: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._terminal = Terminal(file=stream, force_terminal=True, **literal)
        if log_path is not None:
            self._log_file = log_path.open("a", encoding="utf-8", errors="backslashreplace")
        self._plain = RichConsole(force_terminal=False, color_system=None, width=10_000, **literal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Prints the last step if it was not printed, removes the progress line and closes train.log."""
        self._end_steps()
        if self._log_file is not None:
            with contextlib.suppress(OSError):  # flushing may fail as before
                self._log_file.close()

    def note(self, text: str) -> None:
        """Prints an event: a checkpoint was written, a run was resumed."""
        self._print(_text((text, "")))

    def warning(self, text: str) -> None:
        """Prints a warning."""
        self._print(_text(("warning: ", "bold yellow"), (text, "yellow")))

    def failure(self, text: str) -> None:
        """Prints the error that ends a run, on standard error."""
        self._end_steps()
        self._hide_progress()
        if self._is_main:
            with contextlib.suppress(OSError, ValueError):  # it may be full or closed as well
                print(f"switchyard: error: {visible(text)}", file=sys.stderr, flush=True)
        self._print(_text(("error: ", ""), (text, "")), in_stream=False)

    def start_table(self, rows: Sequence[tuple[str, str, str]], shown: Collection[str] | None = None) -> None:
        """Prints rows of (what, choice, why). `shown`: the rows, by `what`, for standard output, None: all; train.log
        gets all rows."""
        short = [row for row in rows if shown is None or row[0] in shown]
        self._print(self._table(short), in_log=len(short) == len(rows))
        if len(short) < len(rows):
            self._print(self._table(rows), in_stream=False)
        self._print(_text())

    def _table(self, rows: Sequence[tuple[str, str, str]]) -> "Table":
        from rich.table import Table

        table = Table.grid(padding=(0, 3, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for what, choice, why in rows:
            table.add_row(_text((what, "dim")), _text((choice, "")), _text((why, "dim")))
        return table

    def progress(self, stage: str, fraction: float) -> None:
        """Shows the progress of a stage of data preparation, from 0 to 1; at 1 its duration is printed, if it was
        noticeable. Callers handle OSErrors of their own files; an OSError of the output is therefore raised by the next
        method that prints."""
        try:
            self._progress(stage, fraction)
        except OSError as error:
            self._output_error = error

    def _progress(self, stage: str, fraction: float) -> None:
        now = self._clock()
        if self._stage is None or self._stage[0] != stage:
            self._stage = (stage, now)
            self._pace.restart()
        seconds = now - self._stage[1]
        if fraction >= 1:
            self._stage = None
            self._hide_progress()
            if seconds >= _NOTICEABLE_SECONDS:
                self._print(_text((f"{stage}: {seconds:.1f} s", "dim")))
            return
        detail = f"{fraction:.0%}  {_clock_face(seconds)}"
        if self._pace.due():
            self._print(_text((f"{stage}  {detail}", "")), on_terminal=False)
        self._show_progress(stage, fraction, detail)

    def step(self, row: Row, steps: int) -> None:
        """Shows a logged step of `steps`: on a terminal in the progress line; as plain lines the first and the last
        step, and those between at a limited rate."""
        now, step = self._clock(), row["step"]
        is_first = self._first is None
        if self._first is None:
            self._first = (step, now)
            self._pace.restart()
        first_step, start = self._first
        left = _clock_face((now - start) / (step - first_step) * (steps - step)) if step > first_step else "-:--:--"
        line = _text((_step_line(row, steps, left), ""))
        in_plain_files = is_first or self._pace.due()
        if in_plain_files:
            self._print(line, on_terminal=False)
        self._last_step = (line, in_plain_files)
        if step >= steps:
            self._end_steps()
            return
        detail = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  {left} left"
        self._show_progress(f"step {step}/{steps}", step / steps, detail)

    def evaluation(self, row: Row) -> None:
        """Prints an evaluation during training: step, val_loss, val_bits_per_byte (or None)."""
        loss, bits = row["val_loss"], row["val_bits_per_byte"]
        compression = "" if bits is None else f"  bits/byte {bits:.3f}"
        further = "  ".join(f"{what} {value}" for what, value in _beside_loss(row))
        line = f"step {row['step']}  held-out loss {loss:.4f}  {further}{compression}"
        self._print(_text((line, "cyan")))

    def held_out(self, row: Row, gzip_bits_per_byte: float | None) -> None:
        """Prints loss, perplexity and, if known, bits per byte of held-out text."""
        loss, bits = row["val_loss"], row["val_bits_per_byte"]
        self._print(_text())
        self._pair("held-out loss", f"{loss:.4f}" if "val_reward_accuracy" in row else f"{loss:.4f} nats/token")
        for what, value in _beside_loss(row):
            self._pair(what, value)
        if bits is not None:
            compared = "" if gzip_bits_per_byte is None else f"   gzip -9: {gzip_bits_per_byte:.3f} bits/byte"
            self._pair("bits per byte", f"{bits:.3f}{compared}")

    def sample(self, prompt: str, text: str) -> None:
        """Prints generated text after its prompt, indented."""
        from rich.padding import Padding

        self._print(_text(("\nsample", "dim")))
        self._print(Padding(_text((prompt, "dim"), (text, "")), (0, 0, 0, 2), expand=False))

    def summary(
        self,
        evaluation: Row,
        *,
        gzip_bits_per_byte: float | None,
        load: ExpertLoad | None,
        sample: tuple[str, str] | None,
        paths: list[tuple[str, str]],
    ) -> None:
        """Prints the summary at the end of a run. `evaluation`: the row of the last one. `load`: None for a dense
        model. `sample`: prompt and generated text. `paths`: (what, path or command) per line, not wrapped, for
        copying."""
        self._end_steps()
        self.held_out(evaluation, gzip_bits_per_byte)
        if load is not None:
            heading, *lines = load_lines(load, self._terminal.width if self._terminal else _PLAIN_WIDTH)
            self._print(_text())
            self._print(_text((f"{heading}\n", "dim"), ("\n".join(lines), "")))
        if sample is not None:
            self.sample(*sample)
        self._print(_text())
        for what, value in paths:
            self._pair(what, value)

    def _pair(self, what: str, value: str) -> None:
        self._print(_text((f"{what:<16}", "dim"), (value, "")), whole=True)

    def _print(
        self,
        what: "RenderableType",
        *,
        whole: bool = False,
        on_terminal: bool = True,
        in_plain_files: bool = True,
        in_stream: bool = True,
        in_log: bool = True,
    ) -> None:
        """`whole`: do not wrap long lines, so that commands can be copied from a terminal."""
        if self._output_error is not None:
            raise self._output_error
        if self._terminal and on_terminal and in_stream:
            with self._output():
                self._terminal.print(what, soft_wrap=whole)
        plain_stream = None if self._terminal else self._stream
        if not in_plain_files or not (plain_stream or self._log_file):
            return
        with self._plain.capture() as capture:
            self._plain.print(what, soft_wrap=True)
        lines = "".join(line.rstrip() + "\n" for line in capture.get().splitlines())
        if in_log:
            self._log(lines)
        if plain_stream and in_stream:
            with self._output():
                plain_stream.write(lines)
                plain_stream.flush()

    def _log(self, lines: str) -> None:
        if self._log_file is None or self.log_error is not None:
            return
        try:
            self._log_file.write(lines)
            self._log_file.flush()
        except OSError as error:
            self.log_error = error
            self.warning(f"{self._log_file.name} cannot be written any more: {error.strerror}")

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Context manager around every write to standard output.

        Raises:
            OSError: it cannot be written, and losing it is an error.
        """
        try:
            yield
        except OSError as error:
            stream, live = self._stream, self._live
            self._stream = self._terminal = self._live = None
            if stream is not None:
                discard_output(stream)
            if live is not None:
                with contextlib.suppress(OSError):
                    live.stop()  # restores sys.stdout, which it had replaced
            if not self._may_lose_output:
                raise
            self._log(f"standard output cannot be written any more ({error.strerror}): the run continues without it\n")

    def _show_progress(self, label: str, fraction: float, detail: str) -> None:
        if not self._terminal or self._clock() - self._drawn < _REFRESH_SECONDS:
            return
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        line = Table.grid(padding=(0, 2, 0, 0))
        width = self._terminal.width - len(label) - len(detail) - 5
        if width >= 5:
            bar = ProgressBar(total=1, completed=fraction, width=min(width, 40), complete_style="cyan")
            line.add_row(_text((label, "")), bar, _text((detail, "")))
        else:
            line.add_row(_text((detail, "")))
        if self._live is None:
            # Refreshed explicitly: a refresh thread would interfere with forks and signals.
            self._live = Live(console=self._terminal, auto_refresh=False, transient=True)
            with self._output():
                self._live.start()
        if self._live is not None:  # output was not lost in the meantime
            with self._output():
                self._live.update(line, refresh=True)
        self._drawn = self._clock()

    def _hide_progress(self) -> None:
        if self._live is not None:
            with self._output():
                self._live.stop()
            self._live = None
        self._drawn = float("-inf")

    def _end_steps(self) -> None:
        self._hide_progress()
        if self._last_step is not None:
            line, in_plain_files = self._last_step
            self._last_step = None
            self._print(line, in_plain_files=not in_plain_files)


class _Pace:
    """Limits the rate of plain lines: one per second; in a long run, one each time the elapsed time has grown by half a
    percent, but at least one per minute. The log of a run of three days has some 5,000 lines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._start = self._last = self._clock()

    def due(self) -> bool:
        now = self._clock()
        if now - self._last < min(60.0, max(1.0, (now - self._start) / 200)):
            return False
        self._last = now
        return True


def _text(*parts: tuple[str, str]) -> "Text":
    """One line of (text, style) parts."""
    from rich.text import Text

    return Text.assemble(*((visible(part), style) for part, style in parts))


def _beside_loss(row: Row) -> list[tuple[str, str]]:
    """What an evaluation shows beside the loss: perplexity, or of preferences accuracy and margin."""
    if "val_reward_accuracy" not in row:
        return [("perplexity", _perplexity(row["val_loss"]))]
    return [("accuracy", f"{row['val_reward_accuracy']:.3f}"), ("margin", f"{row['val_reward_margin']:.4g}")]


def _perplexity(loss: float) -> str:
    with np.errstate(over="ignore"):
        return f"{np.exp(loss):.4g}"


def _clock_face(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _step_line(row: Row, steps: int, left: str) -> str:
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {row['loss']:7.4f}",
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:6.3f}",
        f"{row['tokens_per_second']:9,.0f} tokens/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:5.1%}")
    if row["load_max_over_mean"] is not None:  # a model with experts
        parts.append(f"dropped {row['dropped_fraction']:5.1%}  load {row['load_max_over_mean']:5.2f}x")
    waits = row["data_wait"] / row["step_seconds"]
    parts += [f"waits for data {waits:.0%}"] if waits > 0.05 else []
    parts += [f"skipped {row['skipped']}"] if row.get("skipped") else []
    parts += [f"{left} left"] if row["step"] < steps else []
    return "  ".join(parts)
