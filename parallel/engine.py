"""Runs a model under Megatron-Core's pipeline schedules, gradient buckets and distributed optimizer.

The engine is independent of the model. A pipeline chunk is a module with
`forward(tokens, positions, labels, batch_ctx) -> loss per token [B, S]`, `end_step`, and the methods that the schedules
call.

Legend: B batch, S sequence.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import OptimConfig
from parallel import block_adamw
from parallel.batch_context import EVALUATE, TRAIN, BatchContext, RoutingRecorder
from parallel.block_update import UpdateBlock
from parallel.chunked_ops import sum_of_squares
from parallel.collectives import sum_over_world
from parallel.device_timer import DeviceTimer
from parallel.distributed_optimizer import NO_OVERLAP, Overlap, build_optimizer, set_rates
from parallel.freezing import freeze
from parallel.megatron_compat import parameters_in_norm, without_streams
from parallel.objective import Batch, Objective, StepLoss, evaluation_sums, shard_over, training_loss
from parallel.process_groups import Runtime

_SHARDED = ("tokens", "labels", "padding", "routing", "routing_kept")
"""What of a micro-batch is sharded over cp."""


class Chunk(Protocol):
    """A pipeline chunk of the model."""

    def end_step(self, *, applied: bool) -> None:
        """Called at the end of a step, after its update was applied or skipped."""

    def check_batch(self, batch: "Batch") -> None:
        """Called with a micro-batch in host memory that has `routing` or `routing_kept`. Raises ValueError if it is not
        of this model."""


class Engine:
    """This rank's part of a distributed model and its optimizer."""

    def __init__(
        self,
        config: Any,
        runtime: Runtime,
        optim: OptimConfig | None,
        build_chunk: Callable[[int], torch.nn.Module],
        overlap: Overlap = NO_OVERLAP,
        adam: type[torch.optim.Optimizer] = torch.optim.AdamW,
        frozen: Collection[str] = (),
        update_block: UpdateBlock | None = None,
        objective: Objective | None = None,
        trained: Callable[[str], bool] | None = None,
    ):
        """Args:
        config: Megatron-Core's TransformerConfig.
        optim: None: no gradient buckets and no optimizer (evaluation, generation).
        build_chunk: builds this rank's i-th pipeline chunk.
        adam: the class of the optimizer.
        frozen: logical names of parameters that are not trained.
        update_block: the update of BlockAdamW; None: in plain PyTorch.
        objective: what is minimised; None: the cross-entropy of the next token.
        trained: whether a logical name is that of an adapter, which alone are trained and kept in checkpoints;
            None: the model has no adapters.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.config, self.runtime, self.optim = config, runtime, optim
        self.is_adapter = trained
        self.modules = [build_chunk(i) for i in range(runtime.layout.vpp)]
        """The pipeline chunks without the DistributedDataParallel wrapper."""
        self.objective = objective
        self._metric_names = objective.metrics if objective else ()
        self.loss = math.nan
        """Of the last step, once it is summed over all ranks: by `forward_backward` or by `update`."""
        self.metrics: dict[str, float] = {}
        """The objective's metrics of the same step: means over the global batch."""
        self.summed: dict[str, Tensor] = {}
        """What the last `update` summed over all ranks, by name, in host memory."""
        self.forward_passes = 0
        """Counts the forward passes that have started: a sign of progress for the watchdog."""
        self.chunks: list[Any] = list(self.modules)
        self.optimizer: Any = None
        self._step_matrices: Callable[[], None] = lambda: None
        if optim is not None:
            if trained:
                freeze(self.modules, lambda name: not trained(name))
            elif frozen:
                freeze(self.modules, frozen.__contains__)
            self._build_optimizer(optim, overlap, adam, update_block)
        self._schedule = get_forward_backward_func()
        self.compute_timer = DeviceTimer(runtime.device)
        """Duration of the last forward_backward, without waiting for other data-parallel ranks."""

    def _build_optimizer(
        self, optim: OptimConfig, overlap: Overlap, adam: type[torch.optim.Optimizer], update_block: UpdateBlock | None
    ) -> None:
        """Gradient buckets around the pipeline chunks, and the optimizer of their parameters."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        config, runtime = self.config, self.runtime
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            num_distributed_optimizer_instances=runtime.layout.optimizer_instances,
            grad_reduce_in_fp32=optim.grad_dtype == "fp32",
            overlap_grad_reduce=overlap.grad_reduce,
            overlap_param_gather=overlap.param_gather,
        )
        with without_streams():
            self.chunks = [DistributedDataParallel(config, ddp, m) for m in self.modules]
        if overlap.grad_reduce:
            # The schedules disable gradient reduction until the last micro-batch.
            wait = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = wait if len(wait) > 1 else wait[0]
        groups = runtime.groups
        self.optimizer = build_optimizer(optim, config.params_dtype, self.chunks, overlap, adam, groups)
        if block_adamw.is_needed(optim):
            self._step_matrices = block_adamw.install(self.optimizer, optim, self.modules, groups, update_block)

    def forward_backward(self, batches: list[Batch], *, step: int, recorder: RoutingRecorder | None = None) -> Tensor:
        """`compute_gradients`, and an all-reduce for the loss alone. Returns the mean cross-entropy over the global
        batch's labels in nats, weighted by loss_mask, or the objective's mean loss over its prompts; a scalar, the same
        on every rank."""
        self.compute_gradients(batches, step=step, recorder=recorder)
        total = self._losses.clone()
        dist.all_reduce(total)
        return self._mean_loss(total)

    def compute_gradients(self, batches: list[Batch], *, step: int, recorder: RoutingRecorder | None = None) -> None:
        """Computes the gradients of one global batch, reduced over the data-parallel ranks. The loss stays where it is
        computed, until `update` sums it over the ranks together with the gradient norm.

        Args:
            batches: this data-parallel rank's micro-batches, assigned round-robin (corpus.stream.BatchShard).
            step: the optimizer step; seeds the layers' random numbers.
            recorder: receives what the routers choose.
        """
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        # Megatron-Core multiplies the main loss by cp and divides it by the number of micro-batches, and its gradient
        # buckets divide by dp * cp. The same factors must apply to losses that layers attach themselves.
        labels = self._mean_weight(batches)
        scale = self.runtime.layout.cp / len(batches)
        batch_ctx = BatchContext(TRAIN, loss_scale=scale, loss_labels=labels, step=step, recorder=recorder)

        def loss(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            # Not over the micro-batch's own weights: every label of the global batch counts alike, wherever it is.
            if "loss_mask" in batch:
                losses_BS = losses_BS * self._cp_shard(batch["loss_mask"])
            mean = losses_BS.sum() / labels
            return mean, mean.detach().clone()

        step_loss = training_loss(self.objective, self.runtime.groups.cp) if self.objective else loss
        with self.compute_timer:
            parts = self.run_forward(batches, step_loss, batch_ctx)
        finalize_model_grads(self.chunks)
        self._losses = self._sum_micro_batches(parts, 1 + len(self._metric_names))
        self._micro_batches = len(batches) * self.runtime.layout.dp

    def _mean_loss(self, total: Tensor) -> Tensor:
        """The step's loss, of the sums over all ranks; also sets `loss` and `metrics`."""
        # Summed over cp, averaged over dp; tensor-parallel ranks have the same value.
        means = total / self.runtime.layout.tp / self._micro_batches
        self.loss, *metrics = means.tolist()
        self.metrics = dict(zip(self._metric_names, metrics, strict=True))
        return means[0]

    def _mean_weight(self, batches: list[Batch]) -> Tensor:
        """The weights of the labels of the global batch, added up, per micro-batch: a scalar on the device. Of running
        text, without loss_mask, each rank knows it by itself; an objective does not need it."""
        if self.objective is not None or not any("loss_mask" in batch for batch in batches):
            return torch.tensor(float(batches[0]["labels"].numel()), device=self.runtime.device)
        masks = (batch.get("loss_mask", torch.ones(batch["labels"].shape)) for batch in batches)
        weights = torch.stack([mask.sum(dtype=torch.float64).cpu() for mask in masks])
        total = weights.sum().to(self.runtime.device)
        dist.all_reduce(total, group=self.runtime.groups.dp)
        mean = (total / (len(batches) * self.runtime.layout.dp)).float()
        return mean.where(mean > 0, 1.0)  # without any, the loss is 0

    def evaluate(self, batches: list[Batch], recorder: RoutingRecorder | None = None) -> tuple[float, float]:
        """(sum of the losses of the labels in nats, weighted by loss_mask, sum of these weights) over the micro-batches
        of all ranks.

        Args:
            recorder: receives what the routers choose.
        """
        for chunk in self.chunks:
            chunk.eval()

        def loss(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            mask_BS = self._cp_shard(batch["loss_mask"])
            total = (losses_BS.double() * mask_BS).sum()
            return total.clone(), torch.stack([total, mask_BS.double().sum()])

        with torch.no_grad():
            parts = self.run_forward(batches, loss, BatchContext(EVALUATE, recorder=recorder))
        nats, tokens = self._sum_last_stage(parts, 2).tolist()
        return nats, tokens

    def evaluate_objective(self, batches: list[Batch]) -> tuple[dict[str, float], int]:
        """({"loss" and each metric of the objective: its sum over the prompts that count}, their number) over the
        micro-batches of all ranks."""
        assert self.objective is not None
        for chunk in self.chunks:
            chunk.eval()
        names = ("loss", *self.objective.metrics)
        with torch.no_grad():
            step_loss = evaluation_sums(self.objective, self.runtime.groups.cp)
            parts = self.run_forward(batches, step_loss, BatchContext(EVALUATE))
        *sums, count = self._sum_last_stage(parts, len(names) + 1).tolist()
        return dict(zip(names, sums, strict=True)), round(count)

    def run_forward(self, batches: list[Batch], loss: StepLoss, batch_ctx: BatchContext) -> list[Tensor]:
        """Runs micro-batches through the pipeline; with batch_ctx.mode TRAIN also their backward passes.

        Args:
            loss: called on the last pipeline stage with the model's output and the micro-batch. Returns (the loss to
                run backward from, what this method returns for the micro-batch).
            batch_ctx: the context of all micro-batches; micro_batch, host positions and padding are filled in.

        Returns:
            One tensor per micro-batch on the last pipeline stage; an empty list on the others.
        """
        dp = self.runtime.groups.dp

        def step(batches: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            self.forward_passes += 1
            index, batch = next(batches)
            sharded = {k: self._cp_shard(batch[k]) for k in _SHARDED if k in batch}
            this = replace(
                batch_ctx,
                micro_batch=index * dp.size() + dp.rank(),
                host_positions_BS=host_positions[index],
                padding_BS=sharded.get("padding"),
                labels_BS=batch.get("labels"),
                loss_mask_BS=batch.get("loss_mask"),
                routing_BSLK=sharded.get("routing"),
                routing_kept_BSLK=sharded.get("routing_kept"),
            )
            output = chunk(sharded["tokens"], batch["positions"], sharded.get("labels"), this)
            return output, lambda out: loss(out, batch)

        device = self.runtime.device
        for batch in batches:
            if "routing" in batch or "routing_kept" in batch:
                cast("list[Chunk]", self.modules)[0].check_batch(batch)
        host_positions = [batch["positions"] for batch in batches]
        batches = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in batches]
        if self.runtime.layout.pp == 1 and batch_ctx.mode != TRAIN:  # there is nothing to schedule
            passes = (step(iter([numbered]), self.chunks[0]) for numbered in enumerate(batches))
            return [of_output(output)[1] for output, of_output in passes]
        iterators: list[Iterator[tuple[int, Batch]]] = [enumerate(batches) for _ in self.chunks]
        micro_batch, sequence = batches[0]["tokens"].shape
        return self._schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=sequence,
            micro_batch_size=micro_batch,
            decoder_seq_length=sequence,
            forward_only=batch_ctx.mode != TRAIN,
        )

    def _cp_shard(self, x_BS: Tensor) -> Tensor:
        return shard_over(x_BS, self.runtime.groups.cp)

    def _sum_last_stage(self, parts: list[Tensor], width: int) -> Tensor:
        """Sums the results of the last stage over micro-batches and ranks. Returns fp64 [width], the same on every
        rank."""
        total = self._sum_micro_batches(parts, width)
        dist.all_reduce(total)
        return total / self.runtime.layout.tp

    def _sum_micro_batches(self, parts: list[Tensor], width: int) -> Tensor:
        """fp64 [width]: this rank's term of that sum, without dividing by tp. Zeros on other stages."""
        total = torch.zeros(width, dtype=torch.float64, device=self.runtime.device)
        for part in parts:
            total += part.double()
        return total

    def update(
        self, lr: float, *, loss: float | None = None, beside: Mapping[str, Tensor] | None = None
    ) -> tuple[float, bool]:
        """Clips the gradients and applies them. If the gradient norm or the loss is not finite, weights and moments are
        left unchanged.

        Args:
            loss: of the step, where forward_backward has summed it; None: it is summed together with the norm.
            beside: further fp64 tensors to sum over all ranks in the same all-reduce (`summed`); the same names and
                shapes on every rank.

        Returns:
            (global gradient norm before clipping, whether the update was applied).
        """
        optimizer, optim = self.optimizer, self.optim
        assert optimizer is not None and optim is not None
        in_blocks = block_adamw.is_needed(optim)  # reads the gradients from the buckets
        if not in_blocks:
            optimizer.prepare_grads()
        own = {"squared_norm": self._squared_norm()} | ({"losses": self._losses} if loss is None else {})
        self.summed = sum_over_world({**own, **(beside or {})}, self.runtime.device)
        norm = math.sqrt(self.summed["squared_norm"].item())
        loss = self._mean_loss(self.summed["losses"]).item() if loss is None else loss
        applied = math.isfinite(norm + loss)
        for module in cast("list[Chunk]", self.modules):
            module.end_step(applied=applied)
        if not applied:
            return norm, False
        scale = optim.clip_grad / (norm + 1e-6) if 0 < optim.clip_grad < norm else 1.0
        if in_blocks:
            for part in optimizer.chained_optimizers:
                if not part.is_stub_optimizer:
                    part.optimizer.grad_scale = scale
        elif scale != 1.0:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:  # a stage may be frozen altogether
                torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateUsage]
        set_rates(optimizer, optim, lr)
        self._step_matrices()
        optimizer.step_with_ready_grads()
        return norm, True

    def _squared_norm(self) -> Tensor:
        """This rank's term of the square of the gradient norm, fp64: over all ranks every element is counted once. Not
        Megatron-Core's own, which would use a TransformerEngine or Apex kernel that nothing has verified."""
        parts = self.optimizer.chained_optimizers
        if self.optim is not None and block_adamw.is_needed(self.optim):
            grads = [g for part in parts for g in block_adamw.gradients_for_norm(part)]
        else:
            grads = [p.grad for part in parts for p in parameters_in_norm(part) if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        if grads:
            square += sum_of_squares(grads)
        return square / self.runtime.layout.optimizer_instances  # each of them has all of the gradient

    def nonfinite_gradients(self, limit: int = 3) -> list[str]:
        """Names of at most `limit` parameters whose gradient on this rank is not finite."""
        named = ((n, p) for module in self.modules for n, p in module.named_parameters() if p.requires_grad)
        bad = (name for name, p in named if not torch.isfinite(block_adamw.gradient_of(p)).all())
        return [name for name, _ in zip(bad, range(limit), strict=False)]
