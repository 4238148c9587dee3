"""What can go wrong while a run goes on: updates that are not finite, another process in the run directory."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why. Exit code 1."""


class RankError(RuntimeError):
    """This rank failed, or has seen another fail, as nobody foresaw. The message is for the screen; the traceback is in
    train.log."""


class RunDirTakenOver(RunFailed):
    """Another process goes on in the run directory, so this one must not write there any more."""


class SkipCounter:
    """Counts updates that were left out because the loss or a gradient was not finite.

    Args:
        limit: how many in a row end the run.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_row = 0
        self.total = 0

    def applied(self) -> None:
        self.in_row = 0

    def skipped(self, step: int, culprits: list[str]) -> str:
        """Counts one and says it in a sentence.

        Raises:
            RunFailed: it was one too many in a row.
        """
        self.in_row += 1
        self.total += 1
        named = ", ".join(culprits) or "loss"
        message = f"step {step}: update skipped, not finite: {named} ({self.in_row} in a row, {self.limit} allowed)"
        if self.in_row > self.limit:
            raise RunFailed(f"{message}. The newest checkpoint is untouched; lower optim.lr or raise guard.max_skipped")
        return message
