"""Megatron-Core's schedules, gradient buckets and distributed optimizer behind three calls: forward-backward over a
global batch, update, evaluate. Knows nothing of what the model computes; a chunk offers
`forward(tokens, positions, labels, batch_ctx) -> loss per token [B, S]`, `end_step` and what the schedules ask for.

Legend: B batch, S sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig, OptimConfig, ParallelConfig
from parallel import block_adamw
from parallel.batch_context import EVALUATE, GENERATE, TRAIN, BatchContext
from parallel.chunked_ops import sum_of_squares
from parallel.device_timer import DeviceTimer
from parallel.megatron_compat import building_optimizer, parameters_in_norm
from parallel.process_groups import Runtime

Batch = dict[str, Tensor]
"""One micro-batch: tokens, labels, positions int64 and loss_mask fp32, each [B, S] over the whole sequence; padding
bool [B, S], True where there is no token, unless there is one everywhere."""


class Chunk(Protocol):
    """A pipeline chunk of the model."""

    def end_step(self, *, applied: bool) -> None:
        """The step is over, its update applied or skipped."""


@dataclass(frozen=True)
class Overlap:
    """Which data-parallel messages travel while the model computes."""

    grad_reduce: bool = False
    param_gather: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, backend: str) -> "Overlap":
        """What the settings ask for; left open, on where sending leaves alone the cores that compute."""
        grads, weights = parallel.overlap_grad_reduce, parallel.overlap_param_gather
        grads = backend == "nccl" if grads is None else grads
        return cls(grads, grads if weights is None else weights)


NO_OVERLAP = Overlap()


def transformer_config(model: ModelConfig, runtime: Runtime, dtype: torch.dtype, *, deterministic: bool) -> Any:
    """Megatron-Core's own configuration object for our layers and its schedules."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = runtime.layout
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        # Of a weight that all heads share, each tensor-parallel rank has the gradient of its own heads: to be added up,
        # with or without sequence parallelism. One over the full width is cut as the heads are.
        qk_layernorm=model.qk_norm == "head",
        ffn_hidden_size=model.ffn_hidden_size,
        num_moe_experts=model.moe.num_experts or None,
        moe_ffn_hidden_size=model.expert_width if model.moe.num_experts else None,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=deterministic,
        perform_initialization=False,  # weights are drawn by models.init, independently of the layout
        add_bias_linear=False,
        gradient_accumulation_fusion=False,  # an Apex extension
        # With interleaved stages a message travels while the next chunk computes. Without, batched point-to-point is
        # NCCL's way round deadlocks between pipeline neighbours; gloo does not have it.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=runtime.backend == "nccl" and layout.vpp == 1,
        batch_p2p_sync=False,  # a device-wide wait after every exchange, for PyTorch older than 1.12
        # Frees a stage's output once it is sent. A message that is still travelling reads it: neither gloo's handle nor
        # NCCL's keeps the storage of a tensor whose `.data` is replaced.
        deallocate_pipeline_outputs=layout.vpp == 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def _build_optimizer(
    optim: OptimConfig, dtype: torch.dtype, chunks: list[Any], overlap: Overlap, adam: type[torch.optim.Optimizer]
) -> Any:
    from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate

    # No decay of norms and biases. Megatron-Core goes by shape, but an expert's bias is a row of a matrix.
    fixed = ParamPredicate("no_decay", lambda p: p.dim() == 1 or getattr(p, "no_decay", False))
    no_decay = {ParamKey(predicate=fixed): ParamGroupOverride(wd_mult=0.0)}
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        # At dp = 1 as well: one code path and one checkpoint format.
        use_distributed_optimizer=True,
        overlap_param_gather=overlap.param_gather,
    )
    with building_optimizer(adam):
        optimizer = get_megatron_optimizer(config, chunks, no_decay, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        if "foreach" in group:  # torch's AdamW; Apex's and TransformerEngine's are fused by nature
            group["fused"], group["foreach"] = True, False
    return optimizer


class Engine:
    """A model spread over the ranks of a run, with its optimizer."""

    def __init__(
        self,
        config: Any,
        runtime: Runtime,
        optim: OptimConfig | None,
        vocab_size: int,
        build_chunk: Callable[[int], torch.nn.Module],
        overlap: Overlap = NO_OVERLAP,
        adam: type[torch.optim.Optimizer] = torch.optim.AdamW,
    ):
        """Args:
        config: from transformer_config.
        optim: None builds no gradient buckets and no optimizer (evaluation, generation).
        build_chunk: makes this rank's i-th pipeline chunk.
        adam: the class of the optimizer (ops.registry.select_adam).
        """
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.config, self.runtime, self.optim, self.vocab_size = config, runtime, optim, vocab_size
        self.modules = [build_chunk(i) for i in range(runtime.layout.vpp)]
        """The bare chunks, for names and parameters."""
        self.forward_passes = 0
        """Forward passes begun; while it grows, the model is at work."""
        self.chunks: list[Any] = list(self.modules)
        self.optimizer = None
        if optim is not None:
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=optim.grad_dtype == "fp32",
                overlap_grad_reduce=overlap.grad_reduce,
                overlap_param_gather=overlap.param_gather,
            )
            self.chunks = [DistributedDataParallel(config, ddp, m) for m in self.modules]
            if overlap.grad_reduce:
                # The schedules hold the reduction back until the last micro-batch.
                wait = [chunk.no_sync for chunk in self.chunks]
                config.no_sync_func = wait if len(wait) > 1 else wait[0]
            self.optimizer = _build_optimizer(optim, config.params_dtype, self.chunks, overlap, adam)
            if block_adamw.is_needed(optim):
                block_adamw.install(self.optimizer, optim, self.modules)
        self._schedule = get_forward_backward_func()
        self.compute_timer = DeviceTimer(runtime.device)
        """Of the last forward_backward, without the wait for other data-parallel ranks."""

    def forward_backward(self, batches: list[Batch], *, step: int) -> Tensor:
        """Adds up the gradients of one global batch, reduced over all ranks.

        Args:
            batches: this data-parallel rank's micro-batches, dealt out in turn (corpus.stream.micro_batches).
            step: the optimizer step that they belong to; names the layers' random numbers.

        Returns:
            The mean cross-entropy over the global batch's tokens in nats, a scalar, the same on every rank.
        """
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        # Megatron-Core multiplies the main loss by cp and divides it by the micro-batches, and its gradient buckets
        # divide by dp * cp. Losses attached inside the model must go through the same factors.
        batch_ctx = BatchContext(TRAIN, loss_scale=self.runtime.layout.cp / len(batches), step=step)

        def loss(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            # Training sequences are packed: every token of the micro-batch counts.
            mean = losses_BS.sum() / batch["labels"].numel()
            return mean, mean.detach().clone()

        with self.compute_timer:
            parts = self._run(batches, loss, batch_ctx)
        finalize_model_grads(self.chunks)
        layout = self.runtime.layout
        # Cut sequences add up; copies over data-parallel ranks average; tensor-parallel ranks hold the same number.
        return self._sum_last_stage(parts, 1).squeeze(0) / (len(batches) * layout.dp)

    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """(sum of the unmasked tokens' losses in nats, their number) over all ranks' micro-batches."""
        for chunk in self.chunks:
            chunk.eval()

        def loss(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            mask_BS = self._my_slice(batch["loss_mask"])
            total = (losses_BS.double() * mask_BS).sum()
            return total.clone(), torch.stack([total, mask_BS.double().sum()])

        with torch.no_grad():
            parts = self._run(batches, loss, BatchContext(EVALUATE))
        nats, tokens = self._sum_last_stage(parts, 2).tolist()
        return nats, round(tokens)

    def next_logits(self, ids: list[int]) -> Tensor:
        """fp32 logits [V] on the CPU for the token after `ids`, the same on every rank; all ranks give the same ids."""
        return self.logits(ids, first=len(ids) - 1)[0]

    @torch.no_grad()
    def logits(self, ids: list[int], first: int = 0) -> Tensor:
        """fp32 logits [len(ids) - first, V] on the CPU for the tokens after each of `ids` from the index `first` on,
        nothing dropped; the same on every rank, and all ranks give the same ids."""
        groups = self.runtime.groups
        for chunk in self.chunks:
            chunk.eval()
        # The sequence is cut over cp and, inside the model, over tp and in attention over twice as many pieces as cp.
        cp = groups.cp.size()
        pieces = math.lcm(cp * groups.tp.size(), 2 * cp if cp > 1 else 1)
        last, length = len(ids) - 1, -(-len(ids) // pieces) * pieces
        tokens = torch.tensor([ids + [0] * (length - len(ids))])
        begin = groups.cp.rank() * (length // cp)  # of this rank's slice
        mine = range(max(first, begin), min(len(ids), begin + length // cp))
        found: list[Tensor] = []

        def keep(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            if mine and groups.dp.rank() == 0:
                found.append(logits_BSV[0, mine.start - begin : mine.stop - begin].float())
            return torch.zeros((), device=self.runtime.device), torch.zeros((), device=self.runtime.device)

        at = torch.arange(length)[None]
        # Padding may reach past the longest sequence, and with it past the table of rotary positions.
        batch = {"tokens": tokens, "positions": at.clamp(max=last), "padding": at > last}
        layout = self.runtime.layout
        # The interleaved schedule does not run with fewer micro-batches than stages.
        self._run([batch] * (layout.pp if layout.vpp > 1 else 1), keep, BatchContext(GENERATE))
        # Each holder fills its slice of the sequence and of the vocabulary; everyone else adds zeros.
        logits_SV = torch.zeros(len(ids) - first, self.vocab_size, device=self.runtime.device)
        if found:
            rows_SV = logits_SV[mine.start - first : mine.stop - first]
            rows_SV.chunk(groups.tp.size(), dim=1)[groups.tp.rank()].copy_(found[0])
        dist.all_reduce(logits_SV)
        return logits_SV.cpu()

    def _run(self, batches: list[Batch], loss: Callable[[Tensor, Batch], Any], batch_ctx: BatchContext) -> list[Tensor]:
        """What `loss` returned second for each micro-batch, on the last pipeline stage; elsewhere nothing."""
        dp = self.runtime.groups.dp

        def step(batches: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            self.forward_passes += 1
            index, batch = next(batches)
            cut = {k: self._my_slice(batch[k]) for k in ("tokens", "labels", "padding") if k in batch}
            this = replace(
                batch_ctx,
                micro_batch=index * dp.size() + dp.rank(),
                host_positions_BS=host_positions[index],
                padding_BS=cut.get("padding"),
            )
            return chunk(cut["tokens"], batch["positions"], cut.get("labels"), this), lambda out: loss(out, batch)

        device = self.runtime.device
        host_positions = [batch["positions"] for batch in batches]
        batches = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in batches]
        iterators = [iter(enumerate(batches)) for _ in self.chunks]
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

    def _my_slice(self, x_BS: Tensor) -> Tensor:
        cp = self.runtime.groups.cp
        return x_BS.chunk(cp.size(), dim=1)[cp.rank()].contiguous()

    def _sum_last_stage(self, parts: list[Tensor], width: int) -> Tensor:
        """The parts of the last stage added over micro-batches and over all ranks' tokens, on every rank [width]."""
        total = torch.zeros(width, dtype=torch.float64, device=self.runtime.device)
        for part in parts:
            total += part.double()
        dist.all_reduce(total)
        return total / self.runtime.layout.tp

    def update(self, lr: float, *, loss: float) -> tuple[float, bool]:
        """Clips and applies the gradients. Returns (global gradient norm before clipping, whether the update was
        applied): when the norm or the loss is not finite, weights and moments stay as they are."""
        optimizer, optim = self.optimizer, self.optim
        assert optimizer is not None and optim is not None
        in_blocks = block_adamw.is_needed(optim)  # reads the gradients where they are
        if not in_blocks:
            optimizer.prepare_grads()
        norm = self._grad_norm()
        applied = math.isfinite(norm + loss)
        for module in self.modules:
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
            torch._foreach_mul_(grads, scale)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]  # wd_mult is 0 for norms and biases
        optimizer.step_with_ready_grads()
        return norm, True

    def _grad_norm(self) -> float:
        """The norm over all ranks' gradients, every element counted once. Computed here rather than by Megatron-Core,
        whose own picks up a TransformerEngine or Apex kernel unchecked."""
        parts = self.optimizer.chained_optimizers
        if self.optim is not None and block_adamw.is_needed(self.optim):
            grads = [g for part in parts for g in block_adamw.gradients_for_norm(part)]
        else:
            grads = [p.grad for part in parts for p in parameters_in_norm(part) if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        if grads:
            square += sum_of_squares(grads)
        dist.all_reduce(square)
        return square.sqrt().item()

    def nonfinite_gradients(self, limit: int = 3) -> list[str]:
        """Names of parameters whose gradient on this rank is not finite, at most `limit`."""
        named = ((n, p) for module in self.modules for n, p in module.named_parameters() if p.requires_grad)
        bad = (name for name, p in named if not torch.isfinite(p.main_grad).all())
        return [name for name, _ in zip(bad, range(limit), strict=False)]
