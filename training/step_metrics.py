"""The row of a logged step in metrics.jsonl: what the ranks contribute to it, and the row itself."""

from typing import Any

import torch
from torch import Tensor

from models.mtp import local_loss_sums, mean_losses
from moe.expert_load import ExpertLoad
from moe.metrics import local_sums, reduced_load
from moe.router_metrics import ROUTER_METRICS
from training.builder import BuiltModel
from training.metrics import mfu, peak_flops
from training.stragglers import Stragglers, figures, peak_memory


class StepMetrics:
    """Every rank has an instance and calls every method together with the others. Of a logged step `local` is what this
    rank adds to the all-reduce that the step makes anyway (Engine.update), and `row` is made of the sums.

    Router metrics and seconds per step cover the time since the previous logged step.
    """

    def __init__(self, built: BuiltModel):
        self.built = built
        self.layers = built.config.model.routed_layers
        self.stragglers = Stragglers()
        self.load: ExpertLoad | None = None
        """Of the last logged step; None for a dense model."""
        self.mtp_losses: list[float] = []
        """Of each layer for multi-token prediction."""
        self._largest = torch.empty(0)
        self.steps = 0
        """Of the interval that the last row covers."""
        self._since = 0, 0

    def start(self, step: int, skipped: int) -> None:
        """Starts the first interval, after `step` steps with `skipped` updates skipped."""
        self._since = step, skipped

    def local(self) -> dict[str, Tensor]:
        """What this rank adds to the sums over all ranks; ends the interval on this rank."""
        built, model, device = self.built, self.built.config.model, self.built.runtime.device
        sums = {"ranks": self.stragglers.local(peak_memory(device))}
        if self.layers:
            parts = {i: layer.statistics for m in built.engine.modules for i, layer in m.sparse().items()}
            sums["routers"], self._largest = local_sums(parts, self.layers, model.moe.num_experts, device)
        if model.mtp_num_layers:
            sums["mtp"] = local_loss_sums(built.engine.modules, model.mtp_num_layers, device)
        return sums

    def row(
        self, sums: dict[str, Tensor], *, step: int, tokens: int, skipped: int, norm: float, lr: float, seconds: float
    ) -> dict[str, Any]:
        """The row of the step whose `local` values the ranks have added up to `sums`.

        Args:
            tokens: since the beginning of the run.
            skipped: updates, since this process started.
            seconds: of a step.
        """
        config, built = self.built.config, self.built
        train, moe = config.train, config.model.moe
        self.steps, skipped_now = step - self._since[0], skipped - self._since[1]
        self._since = step, skipped
        if self.layers:
            micro_batches = self.steps * train.global_batch_size // train.micro_batch_size
            layout = built.runtime.layout
            table = sums["routers"]
            self.load = reduced_load(table, self._largest, self.layers, moe.num_experts, layout, micro_batches)
        self.mtp_losses = mean_losses(sums["mtp"]) if "mtp" in sums else []
        rate = train.global_batch_size * train.sequence_length / seconds
        device, world = built.runtime.device, built.runtime.world.size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        row = {
            "step": step,
            "loss": built.engine.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": mfu(built.cost.flops_per_token, rate, peak_flops(name, built.precision), world),
            "world_size": world,
            **(self.load.as_row() if self.load else dict.fromkeys(ROUTER_METRICS)),
            **figures(sums["ranks"]),
            **built.engine.metrics,
        }
        if self.mtp_losses:
            row["mtp_loss"] = sum(self.mtp_losses) / len(self.mtp_losses)
        if skipped_now:
            row["skipped"] = skipped_now
        return row
