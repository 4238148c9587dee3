"""Low-rank adapters (LoRA, arXiv:2106.09685) of the linear layers: y = W x + scale * B A dropout(x). With DoRA
(arXiv:2402.09353) y is then multiplied by (|W| + m) / |W + scale * B A|, of the lengths of rows.

Adapters are hooks, so that the layers are the same code with and without them, and whatever multiplies (an FP8 backend,
Megatron-Core's layers) multiplies only W. Each projection has its own A and B, also where a layer computes several of
them in one product, as attention does queries, keys and values: that is what other programs have.

Legend: S sequence (this rank's slice), B batch, K inner and N outer dimension of a layer, r rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from torch import Tensor, nn

from conf.extensions import input_projections
from conf.lora_layers import AdaptedLayer, adapted_layers, scale_of
from conf.lora_schema import LoraConfig
from conf.model_schema import ModelConfig
from models.attention import Attention
from moe.counter_rng import key, uniform
from moe.expert_lora import ExpertAdapters
from parallel import batch_context
from parallel.batch_context import TRAIN
from parallel.process_groups import Groups
from parallel.sharding import mark, set_sharding


class Adapter(nn.Module):
    """A [r, K] and B [N, r] of a projection.

    Of a layer whose outer dimension is sharded (column-parallel), B is sharded and A replicated; A x is gathered under
    sequence parallelism, and its gradient is the sum over the ranks, since each has other outputs. Of one whose inner
    dimension is sharded (row-parallel), A is sharded and B replicated; A x is the sum over the ranks. Only r numbers of
    a token are sent. A replicated factor that sees the tokens of this rank alone is marked `sequence_parallel`, as the
    norms are: Megatron-Core then sums its gradient.
    """

    def __init__(
        self, layer: AdaptedLayer, lora: LoraConfig, seed: int, dtype: torch.dtype, groups: Groups, *, sequence: bool
    ):
        """sequence: whether there is sequence parallelism."""
        super().__init__()
        assert lora.rank is not None
        self.layer, self.scale, self.dropout, self.seed = layer, scale_of(lora), lora.dropout, seed
        self.tp, self.cp, self.sequence = groups.tp, groups.cp, sequence
        ranks = self.tp.size()
        inner = layer.inner // (ranks if layer.sharded == "inner" else 1)
        outer = layer.outer // (ranks if layer.sharded == "outer" else 1)
        self.a = nn.Parameter(torch.empty(lora.rank, inner, dtype=dtype))
        self.b = nn.Parameter(torch.empty(outer, lora.rank, dtype=dtype))
        # The variance of peft's initial values, those of a linear layer in PyTorch.
        self._place(self.a, 1 if layer.sharded == "inner" else None, (3 * layer.inner) ** -0.5)
        self._place(self.b, 0 if layer.sharded == "outer" else None, 0.0)
        self.m: nn.Parameter | None = None
        if lora.dora:
            self.m = nn.Parameter(torch.empty(outer, dtype=dtype))
            self._place(self.m, 0 if layer.sharded == "outer" else None, 0.0)

    def _place(self, factor: nn.Parameter, dim: int | None, std: float) -> None:
        if dim is None:
            set_sharding(factor, replicas=(self.tp,), std=std)
            mark(factor, sequence_parallel=self.sequence)
        else:
            set_sharding(factor, (dim, self.tp), std=std)

    def forward(self, x_SBK: Tensor) -> Tensor:
        """What is added to the layer's output on this rank [S, B, N]."""
        # A new tensor: the sum over ranks is taken in place, and recomputation keeps the product (MATMUL_OPS).
        z_SBr = F.linear(self._dropped(x_SBK), self.a) * self.scale
        if self.layer.sharded == "outer" and self.sequence:
            z_SBr = tp.gather_from_sequence_parallel_region(z_SBr, group=self.tp)
        elif self.layer.sharded == "outer":
            z_SBr = tp.copy_to_tensor_model_parallel_region(z_SBr, group=self.tp)
        elif self.layer.sharded == "inner" and self.sequence:
            z_SBr = tp.reduce_scatter_to_sequence_parallel_region(z_SBr, group=self.tp)
        elif self.layer.sharded == "inner":
            z_SBr = tp.reduce_from_tensor_model_parallel_region(z_SBr, group=self.tp)
        return F.linear(z_SBr, self.b)

    def magnitude(self, weight_NK: Tensor) -> Tensor | None:
        """[N], what the layer's output is multiplied by after `forward` was added; None without DoRA. The length that
        it divides by is a constant for the gradient (DoRA, section 4.3).

        Args:
            weight_NK: this rank's shard of the frozen weight.
        """
        if self.m is None:
            return None
        with torch.no_grad():
            base_NK = weight_NK.float()
            whole_NK = torch.addmm(base_NK, self.b.float(), self.a.float(), alpha=self.scale)
            squares_2N = torch.stack([base_NK.square().sum(1), whole_NK.square().sum(1)])
            if self.layer.sharded == "inner":
                dist.all_reduce(squares_2N, group=self.tp)
            base_N, whole_N = squares_2N.sqrt()
        return ((base_N + self.m) / whole_N.clamp(min=torch.finfo(whole_N.dtype).tiny)).to(self.m.dtype)

    def _dropped(self, x_SBK: Tensor) -> Tensor:
        """x after dropout: whether a value is dropped is a hash of its token and column."""
        batch_ctx = batch_context.current()
        if not self.dropout or batch_ctx is None or batch_ctx.mode != TRAIN:
            return x_SBK
        columns = self.layer.sharded == "inner"
        part = self.cp.rank() if columns or not self.sequence else self.cp.rank() * self.tp.size() + self.tp.rank()
        tokens = x_SBK.shape[0] * x_SBK.shape[1]
        rows_T = torch.arange(part * tokens, (part + 1) * tokens, device=x_SBK.device)
        named = key(self.seed, "adapter dropout", batch_ctx.step, batch_ctx.micro_batch, self.layer.name)
        kept_TK = uniform(named, rows_T, self.layer.inner) >= self.dropout
        kept_TK = kept_TK.chunk(self.tp.size(), dim=1)[self.tp.rank()] if columns else kept_TK
        return x_SBK * kept_TK.view(x_SBK.shape).to(x_SBK.dtype) / (1 - self.dropout)


def add_adapters(
    blocks: Mapping[str, Any], model: ModelConfig, lora: LoraConfig, seed: int, dtype: torch.dtype, groups: Groups
) -> None:
    """Adds the adapters of lora.target to the blocks of a pipeline chunk, which are named by their index in the
    model."""
    by_block: dict[str, list[AdaptedLayer]] = {}
    for layer in adapted_layers(model, lora):
        by_block.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    for path, layers in by_block.items():
        _, index, inside = path.split(".", 2)
        if index not in blocks:
            continue
        module: Any = blocks[index].get_submodule(inside)
        if layers[0].experts:
            module.lora = ExpertAdapters(
                layers,
                rank=lora.rank or 0,
                scale=scale_of(lora),
                dropout=lora.dropout,
                seed=seed,
                gated=input_projections(model.activation) == 2,
                dtype=dtype,
                groups=groups,
            )
            module.recompute = "activation" in model.recompute
            continue
        sequence = blocks[index].attention_norm.weight.sequence_parallel
        found = {
            layer.name.rpartition(".")[2]: Adapter(layer, lora, seed, dtype, groups, sequence=sequence)
            for layer in layers
        }
        module.lora = nn.ModuleDict(found)
        _hook(module, found)


def _hook(module: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Makes the linear layers of a module add what its adapters compute."""
    if isinstance(module, Attention):
        together = [adapters.get(part) for part in ("q", "gate", "k", "v")]
        if any(together):
            module.qkv.register_forward_hook(_Fused(together, module.parts, module.groups))
        adapters = {part: adapter for part, adapter in adapters.items() if part == "out"}
    for part, adapter in adapters.items():
        module.get_submodule(part).register_forward_hook(_Single(adapter))


class _Single:
    """The hook of a layer with one adapter."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return _added(output, self.adapter(inputs[0]), self.adapter.magnitude(module.weight))


class _Fused:
    """The hook of attention's fused projection: by key/value group its queries, their gates, its key and its value."""

    def __init__(self, adapters: Sequence[Adapter | None], widths: Sequence[int], groups: int):
        self.adapters, self.widths, self.groups = adapters, widths, groups

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        y_SBN = output[0]
        parts = []
        for adapter, width in zip(self.adapters, self.widths, strict=True):
            if adapter is None:
                parts.append(y_SBN.new_zeros((*y_SBN.shape[:2], self.groups, width)))
            else:
                parts.append(adapter(inputs[0]).unflatten(-1, (self.groups, width)))
        return _added(output, torch.cat(parts, -1).flatten(-2), self._magnitude(module.weight))

    def _magnitude(self, weight_NK: Tensor) -> Tensor | None:
        if all(adapter is None or adapter.m is None for adapter in self.adapters):
            return None
        parts, rows_of_parts = [], weight_NK.unflatten(0, (self.groups, -1)).split(list(self.widths), 1)
        for adapter, rows in zip(self.adapters, rows_of_parts, strict=True):
            found = None if adapter is None else adapter.magnitude(rows.flatten(0, 1))
            parts.append(rows.new_ones(rows.shape[:2]) if found is None else found.view(rows.shape[:2]))
        return torch.cat(parts, 1).flatten()


def _added(output: Any, update_SBN: Tensor, magnitude_N: Tensor | None) -> Any:
    """The output of a linear layer, of Megatron-Core's with the bias that is added elsewhere, plus an update, and times
    DoRA's factor."""
    y_SBN, *bias = output if isinstance(output, tuple) else (output,)
    y_SBN = y_SBN + update_SBN if magnitude_N is None else (y_SBN + update_SBN) * magnitude_N
    return (y_SBN, *bias) if bias else y_SBN
