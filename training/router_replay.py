"""Records the routing of an evaluation, and evaluates with a recorded routing. Legend: S sequence, L sparse layers, K
choices per token."""

from pathlib import Path

import torch

from corpus.stream import ValidWindows
from moe.router_replay import RecordedRouting, RouterReplayRecorder
from parallel.engine import Batch
from training.builder import BuiltModel


class RoutingRecording:
    """Collects the routing of an evaluation, batch by batch. Every rank calls every method together."""

    def __init__(self, built: BuiltModel, *, weights: bool):
        """Args:
        weights: whether to keep the gates, too.

        Raises:
            ValueError: the model has no routing that can be replayed.
        """
        self.recorder = RouterReplayRecorder(built.config.model, built.runtime, weights=weights)
        self._built = built
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def add(self, batches: list[Batch]) -> None:
        """Called after the engine has evaluated this rank's micro-batches."""
        self._parts.append(self.recorder.collect(len(batches), *batches[0]["tokens"].shape))

    def save(self, path: Path, windows: ValidWindows) -> None:
        """Writes the file, on rank 0. Raises OSError."""
        if self._built.runtime.world.rank != 0:
            return
        experts = torch.cat([experts for experts, _, _ in self._parts])[: len(windows)]
        kept = torch.cat([kept for _, kept, _ in self._parts])[: len(windows)]
        gates = [gates[: len(windows)] for _, _, gates in self._parts if gates is not None]
        RecordedRouting(
            experts,
            torch.stack([windows.sample(i)["tokens"] for i in range(len(experts))]).int(),
            self._built.config.model.sparse_layers,
            self._built.config.model.moe.num_experts,
            kept,
            torch.cat(gates)[: len(windows)] if gates else None,
        ).save(path)


class ReplayedWindows:
    """The windows of an evaluation, each with its recorded routing."""

    def __init__(self, windows: ValidWindows, path: Path, built: BuiltModel):
        """Raises ValueError: no such file, or the routing of another model."""
        self._windows, self._path = windows, path
        self._recorded = RecordedRouting.read(path)
        self._recorded.check(path, built.config.model, built.config.train.sequence_length)

    def __len__(self) -> int:
        return len(self._windows)

    def check(self, windows: int) -> None:
        """Raises ValueError if one of the first windows is not recorded, or was recorded of other tokens."""
        recorded = len(self._recorded.tokens_NS)
        if windows > recorded:
            raise ValueError(
                f"{self._path} has the routing of {recorded} windows of the text, and {windows} are evaluated; set "
                "batches to as many as were recorded, or record again"
            )
        for index in range(windows):
            if not torch.equal(self._windows.sample(index)["tokens"], self._recorded.tokens_NS[index].long()):
                raise ValueError(
                    f"{self._path} was recorded on other tokens, first in window {index}: the data or the tokenizer "
                    "differ; record again"
                )

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """As that of the windows, routing int64 [S, L, K] and, where it is recorded, routing_kept bool [S, L, K]."""
        recorded = self._recorded

        def of_window(of_all_NSLK: torch.Tensor) -> torch.Tensor:
            return of_all_NSLK[index] if index < len(self) else torch.zeros_like(of_all_NSLK[0])

        replayed = {"routing": of_window(recorded.experts_NSLK).long()}
        if recorded.kept_NSLK is not None:
            replayed["routing_kept"] = of_window(recorded.kept_NSLK)
        return self._windows.sample(index) | replayed
