"""Redirects warnings, log records and the output of C libraries from the terminal to train.log.

In a run on several nodes that file is on storage that all of them share. There only rank 0 writes to it; every other
rank writes to a file on its node, and appends the end of that to train.log if it fails.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import BinaryIO, TextIO

TAIL_BYTES = 2**16
"""What a rank that fails copies of its own log at most: several stack traces of all its threads."""


class OutputRedirection:
    """An active redirection; created by `redirect_output`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._attached = False
        self.crash_descriptor = 1
        """Where the stack traces of a crash belong: train.log, once `attach` knows it."""
        self._undo = contextlib.ExitStack()
        self._held_records = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
        self._held_output = self._undo.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (closed by undo)

        root = logging.getLogger()
        self._undo.callback(setattr, root, "handlers", root.handlers)
        self._undo.callback(root.setLevel, root.level)
        root.handlers = [self._held_records]
        root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logging.captureWarnings(True)
        self._undo.callback(logging.captureWarnings, False)
        # The only record that torch logs to a handler of its own while it is imported: about a CUDA toolkit without a
        # GPU, as on login nodes.
        compiler = logging.getLogger("torch.utils.cpp_extension")
        self._undo.callback(compiler.setLevel, compiler.level)
        compiler.setLevel(logging.ERROR)
        # torch's C++ warnings bypass Python and go to standard error, as its fatal errors, which must stay visible.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self._take_c_output()

    def _take_c_output(self) -> None:
        """Separates Python's sys.stdout, which still goes to the terminal, from file descriptor 1, to which C libraries
        print."""
        before = sys.stdout
        try:
            before.flush()
        except OSError:  # a closed pipe or a full disk
            discard_output(before)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=before.encoding, errors=before.errors)
        self._undo.callback(sys.stdout.close)
        self._undo.callback(setattr, sys, "stdout", before)
        self._undo.callback(os.dup2, sys.stdout.fileno(), 1)
        self._undo.callback(sys.stdout.flush)
        os.dup2(self._held_output.fileno(), 1)

    def attach(self, log_path: Path, *, on_node: bool = False) -> None:
        """Writes the buffered output, and all later output, to `log_path`. Call it after the run directory is known and
        torch is imported: torch adds handlers to its loggers, which are replaced here. A second call has no effect.

        Args:
            on_node: write to a file in the node's directory for temporary files instead, which `undo` removes. Once
                this rank has logged an error of its own, its end is copied to `log_path`, and the file is kept.

        Raises:
            OSError: a file cannot be written.
        """
        if self._attached:
            return
        shared = log_path.open("ab", buffering=0)
        self._undo.callback(shared.close)
        self.crash_descriptor = shared.fileno()
        own = log_path
        if on_node:
            own = _file_on_node(f"{log_path.parent.name[:50]}-rank{self._rank}")
        file = _LogFile(own, encoding="utf-8", errors="backslashreplace")
        self._undo.callback(file.close)
        file.setFormatter(logging.Formatter(f"%(asctime)s rank {self._rank} %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.handlers = [file]
        if on_node:
            copy = _CopyOnError(own, shared, f"rank {self._rank} on {os.uname().nodename}")
            root.handlers.append(copy)  # after the file, which then has the record
            self._undo.callback(copy.remove)
        self._held_records.setTarget(file)
        self._held_records.close()
        for logger in list(root.manager.loggerDict.values()):  # placeholders among them have no handlers
            for handler in [it for it in getattr(logger, "handlers", []) if type(it) is logging.StreamHandler]:
                self._undo.callback(setattr, logger, "propagate", logger.propagate)
                self._undo.callback(logger.addHandler, handler)
                logger.removeHandler(handler)
                logger.propagate = True
        self._attached = True
        os.dup2(file.stream.fileno(), 1)
        self._held_output.seek(0)
        try:
            shutil.copyfileobj(self._held_output, file.stream.buffer)
            file.stream.buffer.flush()
        except OSError as error:
            error.filename = str(log_path)
            raise

    def undo(self) -> None:
        """Ends the redirection, except for TORCH_CPP_LOG_LEVEL. Output that is still buffered, without `attach`, is
        discarded. A `Console` created in between must be closed first."""
        self._undo.close()


def _file_on_node(name: str) -> Path:
    """A new file in the node's directory for temporary files ($TMPDIR, else /tmp)."""
    descriptor, path = tempfile.mkstemp(prefix=f"switchyard-{name}-", suffix=".log")
    os.close(descriptor)
    return Path(path)


class _CopyOnError(logging.Handler):
    """Copies the end of a rank's log to train.log when the rank fails: when it logs an error under the name
    "switchyard", as the watchdog and the worker do. What was copied is not copied again."""

    def __init__(self, path: Path, shared: BinaryIO, who: str) -> None:
        super().__init__(logging.ERROR)
        self._path, self._shared, self._who = path, shared, who
        self._copied = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "switchyard":
            return
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(self._copied, size - TAIL_BYTES)
            file.seek(start)
            header = f"--- from the log of {self._who}, {self._path} there, the last {size - start} bytes:\n"
            self._shared.write(header.encode() + file.read(size - start))  # at once, since other ranks append too
            self._copied = size

    def remove(self) -> None:
        """Removes the rank's log, unless it was copied because of a failure."""
        if not self._copied:
            self._path.unlink(missing_ok=True)


class _LogFile(logging.FileHandler):
    """Ignores write errors, which would print a traceback for every record: `Console`, which writes to the same file,
    reports them."""

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def discard_output(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to any more to /dev/null, so that flushing its buffer, for example at
    exit, does not fail."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: closed, or no descriptor beneath
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def redirect_output(rank: int) -> OutputRedirection:
    """Buffers Python warnings, log records and the standard output of C libraries until `attach` names a log file. Call
    it before torch and megatron-core are imported, since the imports warn, and before a `Console` is created. Standard
    error and Python's own output, including tracebacks, still go to the terminal.

    Rank 0 logs records from level INFO, other ranks from WARNING; each record names its rank.
    """
    return OutputRedirection(rank)
