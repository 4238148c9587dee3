"""The decoder, built by pipeline chunk on Megatron-Core's tensor-parallel layers.

Legend: S sequence (this rank's slice), B batch, D hidden, V vocabulary (this rank's slice).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel as tp
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import LoraConfig, ModelConfig
from models.attention import Attention, query_temperature
from models.init import initialise
from models.kv_cache import KVCache, LayerCache
from models.lora import add_adapters
from models.mla import LatentAttention
from models.module_dict import module_dict
from models.mtp import MTPLayer, MTPStatistics, targets_of
from models.norm import LayerNorm, RMSNorm
from models.reward_head import RewardHead
from models.rope import Rotary
from models.te_layers import around_a_pass, compute_in_fp8, experts_in
from moe.aux_loss import AttachLoss
from moe.layer import MoELayer
from moe.metrics import Report
from moe.mlp import MLP
from moe.router_replay import check_routing
from moe.shared_experts import SharedExperts
from ops.attention_pieces import Piece, attention_pieces
from ops.cross_entropy import SoftCap
from ops.grouped_mlp import forget_weights, use_gemm_backend
from ops.implementations import DEFAULT_OPS, Ops
from ops.linear import MEGATRON_LAYERS, LinearSpec
from ops.te_fp8 import forget_held
from parallel.activation_checkpoint import checkpoint_without_output, checkpointed
from parallel.batch_context import DEFAULT_CONTEXT, TRAIN, BatchContext, entered
from parallel.process_groups import Runtime
from parallel.sharding import mark, set_sharding
from parallel.tensor_parallel import INIT_LATER

T = TypeVar("T")


@dataclass(frozen=True)
class ModelBuildContext:
    """What every block is built from."""

    model: ModelConfig
    config: TransformerConfig
    runtime: Runtime
    seed: int
    """Of the initial weights and of the layers' random numbers."""
    ops: Ops = DEFAULT_OPS
    lora: LoraConfig = field(default_factory=LoraConfig)

    def norm(self) -> RMSNorm:
        return (LayerNorm if self.model.norm == "layernorm" else RMSNorm)(
            self.model.hidden_size,
            self.model.norm_eps,
            function=self.ops.rms_norm,
            dtype=self.config.params_dtype,
            sequence_parallel=self.config.sequence_parallel,
            groups=self.runtime.groups,
            zero_centered=self.model.norm_zero_centered,
        )


Attend = tuple[Tensor, Tensor, list[Piece] | None, Tensor | None, LayerCache | None]
"""Cosines and sines of the positions, who attends to whom (ops.attention_pieces.attention_pieces), the temperature of
queries without rotary embedding (models.attention.query_temperature), and the layer's cache of earlier tokens."""

Ran = tuple[Tensor, Report | None]
"""The output of a block, and what a sparse one counted."""


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and inside a residual."""

    def __init__(self, context: ModelBuildContext, layer: int):
        super().__init__()
        groups = context.runtime.groups
        self.attention_norm, self.ffn_norm = context.norm(), context.norm()
        ops = context.ops
        float8 = ops.float8 if ops.float8 and layer in ops.float8.layers else None
        te_fp8 = ops.te_fp8 if ops.te_fp8 and layer in ops.te_fp8.layers else None
        if te_fp8 or (float8 and float8.linear):  # they multiply in Megatron-Core's layers
            ops = replace(ops, linear=MEGATRON_LAYERS, norm_linear=None)
        fused = None if "norm" in context.model.recompute else ops.norm_linear
        attention, self.norm_is_fused = LatentAttention, False
        if context.model.kv_lora_rank is None:
            self.norm_is_fused = fused is not None
            norm = self.attention_norm if self.norm_is_fused else None
            attention = partial(Attention, rope=context.model.has_rope(layer), norm=norm)
        self.attention = attention(context.model, context.config, groups, ops)
        self.sparse, self.recompute = context.model.is_sparse(layer), context.model.recompute
        self.multiplier = context.model.residual_multiplier
        self.local = context.model.is_local(layer)
        if self.sparse:
            self.ffn = MoELayer(
                context.model,
                ops=replace(ops, experts=experts_in(ops, float8, te_fp8)),
                dtype=context.config.params_dtype,
                sequence_parallel=context.config.sequence_parallel,
                groups=groups,
                draws=(context.seed, layer),
                shared=SharedExperts(context.model, context.config, groups, ops.linear)
                if context.model.moe.num_shared_experts
                else None,
            )
        else:
            with_norm = (fused, self.ffn_norm) if fused else None
            self.ffn = MLP(context.model, context.config, groups, linear=ops.linear, fused=with_norm)
        if float8 is not None and float8.linear is not None:
            use_gemm_backend(self, float8.linear)
        self.outside = ops.te_fp8.outside if ops.te_fp8 and not te_fp8 else nullcontext
        if te_fp8 is not None:
            compute_in_fp8(self, te_fp8, groups)

    def forward(self, x_SBD: Tensor, attend: Attend, batch_ctx: BatchContext) -> Tensor:
        run = partial(checkpointed, self._run) if "full" in self.recompute else self._run
        x_SBD, report = run(x_SBD, attend, batch_ctx)
        if report is not None and isinstance(self.ffn, MoELayer):
            self.ffn.record(report, batch_ctx)
        return x_SBD

    def _run(self, x_SBD: Tensor, attend: Attend, batch_ctx: BatchContext) -> Ran:
        with entered(batch_ctx), self.outside():
            return self._layers(x_SBD, attend, batch_ctx)

    def _layers(self, x_SBD: Tensor, attend: Attend, batch_ctx: BatchContext) -> Ran:
        if self.norm_is_fused:
            out_SBD = self.attention(x_SBD, *attend)
        else:
            out_SBD = self._normed(self.attention_norm, x_SBD, lambda normed: self.attention(normed, *attend))
        x_SBD = torch.add(x_SBD, out_SBD, alpha=self.multiplier)
        if self.sparse:
            out_SBD, report = self._normed(self.ffn_norm, x_SBD, lambda normed: self.ffn(normed, batch_ctx))
        elif isinstance(self.ffn, MLP) and self.ffn.norm_is_fused:
            out_SBD, report = self.ffn(x_SBD), None
        else:
            out_SBD, report = self._normed(self.ffn_norm, x_SBD, self.ffn), None
        return torch.add(x_SBD, out_SBD, alpha=self.multiplier), report

    def _normed(self, norm: RMSNorm, x_SBD: Tensor, layer: Callable[[Tensor], T]) -> T:
        return checkpoint_without_output(norm, [x_SBD], layer) if "norm" in self.recompute else layer(norm(x_SBD))


class ModelChunk(MegatronModule):
    """One pipeline chunk: a run of layers, with the embedding if it is the first and the head if it is the last.
    Layers are named by their index in the whole model, so that a parameter has one name under every layout."""

    def __init__(self, context: ModelBuildContext, *, chunk: int, sequence_length: int, document_mask: bool):
        super().__init__(context.config)
        model, layout, groups = context.model, context.runtime.layout, context.runtime.groups
        chunks, index = layout.pp * layout.vpp, chunk * layout.pp + groups.pp.rank()
        # What Megatron-Core's schedules ask of a model.
        self.pre_process, self.post_process = index == 0, index == chunks - 1
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.stages_share_embedding
        at_end = self.pre_process or self.post_process
        assert groups.embedding is not None or not (at_end and model.stages_share_embedding)
        self.input_tensor = cast("Tensor", None)
        """What a later stage reads. Megatron-Core's schedule sets it before every forward pass."""
        self.token_losses, self.te_fp8 = context.ops.token_losses, context.ops.te_fp8
        self.exchanges_sequence = context.ops.cp_attention is not None

        self.model, self.groups, self.cp, self.document_mask = model, groups, groups.cp, document_mask
        self.rotary = Rotary(model.rotary_width, model.rope_theta, sequence_length, model.rope_scaling)
        std = (model.init_scale / model.hidden_size) ** 0.5
        self.embedding: tp.VocabParallelEmbedding | None = None
        self.mtp_statistics: MTPStatistics | None = None
        if self.pre_process or (self.post_process and model.mtp_num_layers):
            self._build_embedding(context, std)
        self.layers = module_dict({str(i): Block(context, i) for i in layout.chunk_layers(index, model.num_layers)})
        if self.post_process:
            self.final_norm = context.norm()
            self._build_head(context, std)
            further = (MTPLayer(context, Block(context, i)) for i in model.mtp_layers)
            self.mtp = module_dict({str(k): layer for k, layer in enumerate(further)})
            self.mtp_statistics = MTPStatistics(model.mtp_num_layers) if model.mtp_num_layers else None
        add_adapters(self.layers, model, context.lora, context.seed, context.config.params_dtype, groups)
        self.to(context.runtime.device)
        initialise(self, context.seed)

    def _build_embedding(self, context: ModelBuildContext, std: float) -> None:
        model, groups = context.model, context.runtime.groups
        self.embedding = tp.VocabParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            init_method=INIT_LATER,
            config=context.config,
            reduce_scatter_embeddings=context.config.sequence_parallel,
            tp_group=groups.tp,
        )
        self._set_table_sharding(self.embedding.weight, std, copy=not self.pre_process)

    def _set_table_sharding(self, weight_VD: nn.Parameter | None, std: float, *, copy: bool) -> None:
        """Of the embedding, or of its copy on the last stage."""
        alias = "embedding.weight" if copy else None
        table_VD = set_sharding(weight_VD, (0, self.groups.tp), std=std, alias=alias)
        # Gives it a bucket of its own, sharded over data-parallel ranks as on the other stage that holds it.
        # Megatron-Core sums the gradients of the two copies, and counts only one in the gradient norm.
        mark(table_VD, shared=copy, shared_embedding=self.share_embeddings_and_output_weights)

    def _build_head(self, context: ModelBuildContext, std: float) -> None:
        model, groups = context.model, context.runtime.groups
        if model.reward_head:
            self.head = RewardHead(model.hidden_size, context.config, groups)
            return
        # A parameter of both modules: before either's forward pass Megatron-Core waits until it is gathered.
        tied = self.embedding.weight if model.ties_head and self.embedding is not None else None
        spec = LinearSpec(model.hidden_size, model.vocab_size, model.head_bias, context.config, groups.tp)
        self.head = context.ops.linear.column(spec, tied)
        if tied is not None:
            mark(tied, zero_out_wgrad=True)
        elif model.ties_head:
            self._set_table_sharding(self.head.weight, std, copy=True)
        else:
            set_sharding(self.head.weight, (0, groups.tp), std=std)
        if model.head_bias:
            set_sharding(self.head.bias, (0, groups.tp), std=0.0)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """This stage's copy of the embedding."""
        if self.embedding is not None:
            return self.embedding.weight
        return self.head.weight if self.post_process and not self.model.reward_head else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.input_tensor = cast("Tensor", received)  # None on the first stage, which does not read it

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        labels_BS: Tensor | None = None,
        batch_ctx: BatchContext = DEFAULT_CONTEXT,
    ) -> Tensor:
        """Args:
            tokens_BS, labels_BS: this rank's slice of the sequence.
            positions_BS: of the whole sequence; a 0 starts a document.

        Returns:
            Hidden states [S, B, D] within the pipeline; on its last chunk the loss of every token [B, S] in nats
            (fp32), or without labels the logits [B, S, V], with a cache those of the last token [B, 1, V]; of a reward
            model the reward of every token [B, S], or without labels [B, S, 1].
        """
        x_SBD = self._embed(tokens_BS) if self.pre_process else self.input_tensor
        if batch_ctx.cache is not None:
            return self._continue(x_SBD, positions_BS, batch_ctx)
        cos, sin = self.rotary(self._mine(positions_BS).t(), positions_BS.shape[1])
        temperature = query_temperature(self._mine(positions_BS).t(), self.model)
        further = self.post_process and batch_ctx.mode == TRAIN and labels_BS is not None
        predicting = [*self.mtp.values()] if further else []
        blocks = [*self.layers.values(), *(layer.block for layer in predicting)]
        attend = {
            local: (cos, sin, self._pieces(positions_BS, batch_ctx, local), temperature, None)
            for local in {b.local for b in blocks}
        }
        with around_a_pass(self.te_fp8, [int(i) for i in self.layers], batch_ctx):
            for layer in self.layers.values():
                x_SBD = layer(x_SBD, attend[layer.local], batch_ctx)
        if not self.post_process:
            return x_SBD if self.layers else x_SBD.clone()  # Megatron-Core frees what was sent, which may be no view
        x_SBD = self.final_norm(x_SBD)
        if self.model.reward_head:
            rewards_BS = self.head(x_SBD).t()
            return rewards_BS if labels_BS is not None else rewards_BS[..., None]
        if predicting:
            x_SBD = self._predict_further(x_SBD, positions_BS, attend[predicting[0].block.local], batch_ctx)
        logits_SBV = self._logits(x_SBD)
        if labels_BS is None:
            return logits_SBV.transpose(0, 1)
        return self.token_losses(logits_SBV, labels_BS.t(), self.groups.tp).t()

    def _continue(self, x_SBD: Tensor, positions_BS: Tensor, batch_ctx: BatchContext) -> Tensor:
        """forward, of tokens that follow those in the cache, to which they are added."""
        cache: KVCache = batch_ctx.cache
        model, tokens = self.model, positions_BS.shape[1]
        cos, sin = self.rotary(positions_BS.t(), cache.lengths(tokens))
        temperature = query_temperature(positions_BS.t(), model)
        kinds = {}
        for local in {layer.local for layer in self.layers.values()}:
            limits = {"window": model.sliding_window, "chunk": model.attention_chunk_size} if local else {}
            visible = cache.visible(tokens, x_SBD.device, **limits)
            pieces = None
            if visible is None:
                first_BS = cache.first_positions(tokens)
                pieces = attention_pieces(first_BS, 0, 1, any(cache.padding), **limits, sinks=model.attention_sinks)
            kinds[local] = visible, pieces
        for index, layer in self.layers.items():
            visible, pieces = kinds[layer.local]
            attend = (cos, sin, pieces, temperature, cache.layer(int(index), visible))
            x_SBD = layer(x_SBD, attend, batch_ctx)
        return self._logits(self.final_norm(x_SBD[-1:])).transpose(0, 1) if self.post_process else x_SBD

    def _mine(self, x_BS: Tensor) -> Tensor:
        """This rank's slice of a whole sequence."""
        return x_BS.chunk(self.cp.size(), dim=1)[self.cp.rank()]

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        assert self.embedding is not None
        x_SBD = self.embedding(tokens_BS)
        if self.model.embedding_multiplier != 1:
            x_SBD = x_SBD * self.model.embedding_multiplier
        # Under sequence parallelism it comes scattered, sequence first.
        return x_SBD if self.config.sequence_parallel else x_SBD.transpose(0, 1).contiguous()

    def _predict_further(self, x_SBD: Tensor, positions_BS: Tensor, attend: Attend, batch_ctx: BatchContext) -> Tensor:
        """x_SBD, the output of the final norm, with the loss of multi-token prediction attached. Its sum is divided by
        what that of the next token is: targets that do not exist add nothing (DeepSeek-V3, arXiv:2412.19437, eq. 24
        and 25)."""
        assert self.mtp_statistics is not None
        total, hidden_SBD = x_SBD.new_zeros((), dtype=torch.float32), x_SBD
        for index, layer in enumerate(self.mtp.values()):
            targets = targets_of(batch_ctx, positions_BS, index + 1, document_mask=self.document_mask)
            padding_BS = ~self._mine(targets.exists_BS)
            padding_BS = padding_BS if batch_ctx.padding_BS is None else padding_BS | batch_ctx.padding_BS
            embedding_SBD = self._embed(self._mine(targets.tokens_BS))
            hidden_SBD = layer(hidden_SBD, embedding_SBD, attend, replace(batch_ctx, padding_BS=padding_BS))
            labels_SB, weights_BS = self._mine(targets.labels_BS).t(), self._mine(targets.weights_BS)
            losses_BS = self.token_losses(self._logits(hidden_SBD), labels_SB, self.groups.tp).t() * weights_BS
            self.mtp_statistics(index, losses_BS, weights_BS)
            labels = positions_BS.numel() if batch_ctx.loss_labels is None else batch_ctx.loss_labels
            total = total + losses_BS.sum() / labels
        loss = self.model.mtp_loss_scaling_factor / len(self.mtp) * total
        return AttachLoss.apply(x_SBD, loss, batch_ctx.loss_scale) if torch.is_grad_enabled() else x_SBD

    def _pieces(self, positions_BS: Tensor, batch_ctx: BatchContext, local: bool) -> list[Piece] | None:
        """Who attends to whom in the layers with local attention, or in the others."""
        on_host_BS, model = batch_ctx.host_positions_BS, self.model
        if on_host_BS is None:
            on_host_BS = positions_BS.cpu() if self.document_mask else positions_BS
        is_shared = self.cp.size() > 1 and not self.exchanges_sequence
        return attention_pieces(
            on_host_BS,
            self.cp.rank() if is_shared else 0,
            self.cp.size() if is_shared else 1,
            self.document_mask,
            window=model.sliding_window if local else None,
            chunk=model.attention_chunk_size if local else None,
            sinks=model.attention_sinks,
        )

    def _logits(self, x_SBD: Tensor) -> Tensor:
        if self.model.logit_multiplier != 1:  # of the head's input, which is smaller
            x_SBD = x_SBD * self.model.logit_multiplier
        logits_SBV, bias_V = self.head(x_SBD)
        logits_SBV = logits_SBV if bias_V is None else logits_SBV + bias_V
        if self.model.logit_softcap is not None:
            logits_SBV = SoftCap.apply(logits_SBV, self.model.logit_softcap)
        return logits_SBV

    def sparse(self) -> dict[int, MoELayer]:
        """The sparse layers of this chunk by their index in the model, those for multi-token prediction after all
        others."""
        blocks = {int(i): block for i, block in self.layers.items()}
        if self.post_process:
            blocks |= {i: layer.block for i, layer in zip(self.model.mtp_layers, self.mtp.values(), strict=True)}
        return {i: block.ffn for i, block in blocks.items() if isinstance(block.ffn, MoELayer)}

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Raises ValueError if the routing of a micro-batch in host memory is not one of this model."""
        given = batch.get("routing"), batch.get("routing_kept")
        check_routing(*given, self.model, batch["tokens"].shape, batch.get("padding"))

    def end_step(self, *, applied: bool) -> None:
        """Tells the routers that follow them the loads of a step whose update was applied, and forgets the loads and
        the weights in FP8. Called before the optimizer changes the weights."""
        forget_weights(self)
        forget_held(self)
        layers = [layer for layer in self.sparse().values() if layer.router.follows_load]
        if not layers:
            return
        load_L2E = torch.stack([layer.step_load_2E for layer in layers])
        # The tensor-parallel ranks hold different tokens only under sequence parallelism.
        groups = (self.groups.dp_cp, self.groups.tp) if self.config.sequence_parallel else (self.groups.dp_cp,)
        for group in groups:
            dist.all_reduce(load_L2E, group=group)
        for layer, load_2E in zip(layers, load_L2E, strict=True):
            layer.step_load_2E.zero_()
            if applied:
                layer.router.end_step(*load_2E)
