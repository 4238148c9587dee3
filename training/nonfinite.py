"""Counts updates that are skipped because the loss or a gradient is not finite."""

from training.errors import RunFailed


class SkipCounter:
    """Args:
    limit: number of consecutive skipped updates that the run tolerates.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_row = 0
        self.total = 0

    def applied(self) -> None:
        self.in_row = 0

    def skipped(self, step: int, culprits: list[str]) -> str:
        """Counts a skipped update and returns a message about it.

        Raises:
            RunFailed: more than `limit` updates in a row were skipped.
        """
        self.in_row += 1
        self.total += 1
        named = ", ".join(culprits) or "loss"
        message = f"step {step}: update skipped, not finite: {named} ({self.in_row} in a row, {self.limit} allowed)"
        if self.in_row > self.limit:
            raise RunFailed(f"{message}. The newest checkpoint is untouched; lower optim.lr or raise guard.max_skipped")
        return message
