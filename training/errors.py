"""Exceptions that end a run."""


class RunFailed(RuntimeError):
    """The run cannot continue; the message says why. Exit code 1."""


class RankError(RuntimeError):
    """An unexpected exception on this rank, or a failure of another rank. The message is for the terminal; the
    traceback is in train.log."""


class RunDirTakenOver(RunFailed):
    """Another process has taken over the run directory: this one must not write to it any more."""
