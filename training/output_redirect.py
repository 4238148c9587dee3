"""Keeps what the engine says off the screen and in train.log: warnings, log records, what C libraries print."""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO


class OutputRedirection:
    """Keeps off the screen what the engine says; `redirect_output` makes one."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._attached = False
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
        # What torch says while it is imported goes to a handler of its own and so to the screen; that is this alone: of
        # a CUDA toolkit without a GPU, which is what a login node has.
        compiler = logging.getLogger("torch.utils.cpp_extension")
        self._undo.callback(compiler.setLevel, compiler.level)
        compiler.setLevel(logging.ERROR)
        # C++ warnings of torch bypass Python and share standard error with its fatal errors, which must stay visible.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self._take_c_output()

    def _take_c_output(self) -> None:
        """Parts Python's sys.stdout, which stays on the screen, from file descriptor 1, where C libraries print."""
        before = sys.stdout
        try:
            before.flush()
        except OSError:  # its reader is gone, or the disk is full
            discard_output(before)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=before.encoding, errors=before.errors)
        self._undo.callback(sys.stdout.close)
        self._undo.callback(setattr, sys, "stdout", before)
        self._undo.callback(os.dup2, sys.stdout.fileno(), 1)
        self._undo.callback(sys.stdout.flush)
        os.dup2(self._held_output.fileno(), 1)

    def attach(self, log_path: Path) -> None:
        """Appends what was held, and from now on everything, to `log_path`. Call it when the run directory is known and
        the engine imported: torch gives loggers handlers of their own, which are replaced here. A second call does
        nothing.

        Raises:
            OSError: `log_path` cannot be written.
        """
        if self._attached:
            return
        file = _LogFile(log_path, encoding="utf-8", errors="backslashreplace")
        self._undo.callback(file.close)
        file.setFormatter(logging.Formatter(f"%(asctime)s rank {self._rank} %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.handlers = [file]
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
        """Puts everything back but TORCH_CPP_LOG_LEVEL. What is still held, without `attach`, is dropped. A `Console`
        made in between must be closed before."""
        self._undo.close()


class _LogFile(logging.FileHandler):
    """A disk that takes no more records is not worth a traceback for each: `Console`, which writes to the same file,
    reports it."""

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def discard_output(stream: TextIO) -> None:
    """Points a stream that cannot be written any more at /dev/null, so that what is left in its buffer fails nobody
    later on, at the interpreter's exit for example."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: closed, or no descriptor beneath
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def redirect_output(rank: int) -> OutputRedirection:
    """From now on Python warnings, logging records and what C libraries print on standard output are held, and go to
    train.log once `attach` names it. Call it before torch and megatron-core are imported, since the imports warn, and
    before a `Console` is made. Standard error and Python's own output, tracebacks included, stay on the screen.

    Rank 0 keeps records from INFO upwards, the others from WARNING; each record names its rank.
    """
    return OutputRedirection(rank)
