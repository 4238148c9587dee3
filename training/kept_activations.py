"""What a micro-batch keeps on a rank from its forward to its backward pass, and what that needs beyond it, as formulas:
for every layer the tensors that its operations save. `training.meta_step` counts the same in the model
itself, and tests hold the two together.

Legend: D hidden size, F hidden size of a feed-forward layer or an expert, K assignments per token, R rows of experts, T
tokens of a micro-batch on a context-parallel rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from conf.extensions import input_projections
from conf.schema import Config, ModelConfig
from parallel.layout import Layout
from training.adapters import experts_are_adapted, share_adapted
from training.flops import experts_per_token
from training.kept_by_adapters import kept_by_adapters, unread_inputs
from training.kept_by_attention import FLOAT, kept_by_attention

INT = 8
"""Bytes of an index."""
IN_FP32 = ("triton", "grouped_mm_fused", "fp8")
"""Backends of the experts that compute the activation of experts with adapters in fp32 (ops.adapted_experts)."""
SEPARATE = ("loop", "grouped_mm", "te")
"""Backends of the experts whose products and activation are separate operations; the others keep only the first
product's output."""


@dataclass(frozen=True)
class Activations:
    """Of one rank, in bytes of a micro-batch."""

    config: Config
    layout: Layout
    bf16: bool
    on_gpu: bool
    imbalance: float = 1.0
    """Rows of this rank's experts relative to the mean."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def value(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def tokens(self) -> float:
        train = self.config.train
        return train.micro_batch_size * train.sequence_length / self.layout.cp

    @property
    def outside(self) -> float:
        """Tokens outside of tensor-parallel regions."""
        return self.tokens / self.layout.tp if self.layout.sequence_parallel else self.tokens

    @property
    def sent(self) -> float:
        """Rows that this rank sends to experts; capacity that is not used is not padded."""
        return self.tokens / self.layout.tp * experts_per_token(self.model)

    @property
    def rows(self) -> float:
        """R."""
        return self.sent * self.layout.etp * self.imbalance

    @property
    def stays(self) -> bool:
        """Whether all experts are on this rank."""
        return self.layout.ep == self.layout.etp == 1

    @property
    def by_all_gather(self) -> bool:
        """moe.dispatcher.dispatcher_for."""
        moe, ep = self.model.moe, self.layout.ep
        if self.stays or moe.dispatcher == "all_gather":
            return not self.stays
        by_row = moe.load_balancing == "expert_choice" or moe.overlap_degree > 1
        return moe.dispatcher == "auto" and not by_row and moe.top_k > ep > 1

    @property
    def backend(self) -> str:
        """Of the experts, where it is not measured."""
        asked = self.model.moe.backend
        if self.config.precision == "fp8":
            return "te" if self.config.fp8.kernels == "te" else "fp8"
        return asked if asked != "auto" else "grouped_mm" if self.on_gpu and self.bf16 else self._plain_backend

    @property
    def _plain_backend(self) -> str:
        return "loop" if self.on_gpu else "fused"

    def layer(self, *, sparse: bool, recompute: bool = True) -> float:
        """Kept of a layer.

        Args:
            recompute: False: without activation checkpointing, which is what a backward pass brings back.
        """
        again = self.model.recompute if recompute else []
        if "full" in again:
            return self.outside * self.model.hidden_size * self.value + sparse * self._decision(keeps=True)
        # The inputs of two norms, and their outputs, which are inputs of linear layers.
        kept = self.outside * ((2 if "norm" in again else 4) * self.value * self.model.hidden_size + 2 * FLOAT)
        kept += kept_by_attention(self) + kept_by_adapters(self, "attention", sparse=sparse)
        kept -= unread_inputs(self, again, sparse=sparse)
        if not sparse:
            kept += self._mlp(self.model.ffn_hidden_size, again, "ffn")
        elif "moe" in again:
            return kept + self._decision(keeps=True)
        else:
            kept += self._router() + self._experts(again)
        kept += kept_by_adapters(self, "ffn", sparse=sparse)
        shared = sparse and self.model.moe.num_shared_experts > 0
        return kept + (self._mlp(self.model.shared_width, again, "ffn.shared.ffn") if shared else 0.0)

    def head(self) -> float:
        """Input and output of the final norm, and the logits; and of each layer for multi-token prediction the same,
        and what its projection keeps: the embedding, and unless recomputed both norms' outputs."""
        model, d, value = self.model, self.model.hidden_size, self.value
        one = self.outside * ((1 + self._keeps_head_input) * value * d + FLOAT) + self._outputs()
        again = bool({"norm", "full"} & {*model.recompute})
        projection = self.outside * value * d * (1 if again else 3)
        return one * (1 + model.mtp_num_layers) + projection * model.mtp_num_layers

    def _outputs(self) -> float:
        """The logits; of a reward model its input in fp32, and a number for each token."""
        model = self.model
        if model.reward_head:
            return self.outside * FLOAT * (1 + (model.hidden_size if self.value < FLOAT else 0))
        return self.tokens * self.value * model.vocab_size / self.layout.tp

    def beyond(self, *, sparse: int, dense: int, is_last: bool) -> float:
        """At the peak of a backward pass, beyond what the stage's layers keep: at its beginning, with the logits, or in
        the last layer.

        Args:
            sparse, dense: layers of the stage; the last one is sparse if one is.
            is_last: whether it is the last stage.
        """
        if sparse + dense:
            return max(self._backward_of_layer(sparse > 0), self._backward_of_head() if is_last else 0.0)
        # Of the embedding alone its gradient, from that of its output.
        table = self.model.vocab_size / self.layout.tp + self.outside
        return self._backward_of_head() if is_last else self.value * self.model.hidden_size * table

    def _backward_of_head(self) -> float:
        """Gradients of the output layer's weight and input. On a GPU the logits become their own gradient."""
        model, value, layout = self.model, self.value, self.layout
        outputs = 1 if model.reward_head else model.vocab_size / layout.tp
        logits, weight = (value * n * outputs for n in (self.tokens, model.hidden_size))
        # Under sequence parallelism the input's gradient, and what is left of it when it has been scattered.
        inputs = value * model.hidden_size * (self.tokens + layout.sequence_parallel * self.outside)
        if model.reward_head:  # in fp32 first
            inputs = self.outside * model.hidden_size * (value + FLOAT)
        weight *= self._trains_weights
        if self.on_gpu:
            return self.head() + weight + inputs
        return self.head() + max(logits, self._added(weight) + inputs)

    def _added(self, gradient: float) -> float:
        """With the copy that adding a bf16 gradient to an fp32 one makes on a CPU."""
        return gradient * (3 if self.bf16 and not self.on_gpu and self.config.optim.grad_dtype == "fp32" else 1)

    def _backward_of_layer(self, sparse: bool) -> float:
        """What is recomputed, and gradients."""
        again = max(self._activated(sparse), self.layer(sparse=sparse, recompute=False) - self.layer(sparse=sparse))
        above = self.outside * self.model.hidden_size * self.value
        if sparse:
            whole = bool({"full", "moe"} & set(self.model.recompute))
            return above + max(self._gradients_of_rows(whole) + whole * again, self._gradients_of_experts() + again)
        width = self.model.ffn_hidden_size / self.layout.tp
        weight = width * self.model.hidden_size * self.value * self._trains_weights
        return again + above + self._added(weight) + self.tokens * width * self.value

    def _activated(self, sparse: bool) -> float:
        """What recomputing activations brings back; what it keeps instead, the second product's output, stays."""
        separate = self.is_separate if sparse else True
        if "activation" not in self.model.recompute or not separate:
            return 0.0
        adapted = share_adapted(self.config, "ffn.experts" if sparse else "ffn", sparse=sparse)
        again = self._hidden([]) - self._hidden(["activation"], adapted)
        if not sparse:
            return self.tokens * self.value * again * self.model.ffn_hidden_size / self.layout.tp
        return self.rows * self.value * again * self.model.expert_width / self.layout.etp

    def _gradients_of_rows(self, recomputed: bool) -> float:
        """Those that arrive and those that are sent back, or were by the pass that is computed again."""
        travels = not self.stays and not self.by_all_gather
        return travels * (2 + recomputed) * self.rows * self.model.hidden_size * self.value

    def _gradients_of_experts(self) -> float:
        """Of the second product's input and weight; or of the first one's output, input and weight, when what comes
        after it in the layer is gone; or, where experts are one operation, of all of them."""
        model, value = self.model, self.value
        gates, experts = input_projections(model.activation), model.moe.num_experts / self.layout.ep
        width = model.expert_width / self.layout.etp
        weight, rows = experts * width * model.hidden_size * value, self.rows * model.hidden_size * value
        weight *= self._trains_weights
        hidden = self.rows * width * value
        if self.is_separate:
            first = self._added(gates * weight) + gates * hidden + rows - 2 * gates * hidden - rows
            return max(self._added(weight) + hidden, first)
        if self.on_gpu:
            return (1 + gates) * weight + (2 + gates) * hidden + rows
        of_one = 4 * gates * hidden / experts  # one expert after the other
        scattered = rows if self.layout.etp > 1 else 0.0
        return (1 + gates) * weight + max(scattered + of_one, self._added(gates * weight) - gates * weight)

    def shared(self) -> float:
        """Of a micro-batch on a stage, whatever its layers are: cosines and sines."""
        return self.tokens * FLOAT * self.model.rotary_width

    def before_adapters(self) -> float:
        """What the first layer of the model does not keep where adapters alone are trained: the input and the scale of
        its first norm, since nothing before its adapters has a gradient."""
        if self._trains_weights or "full" in self.model.recompute:
            return 0.0
        return self.outside * (self.value * self.model.hidden_size + FLOAT)

    def gathered(self) -> float:
        """Megatron-Core's buffer, into which sequence parallelism gathers, whatever the number of micro-batches. Frozen
        layers gather into tensors of their own, and not again for a weight gradient."""
        if not (self.layout.sequence_parallel and self._trains_weights):
            return 0.0
        return self.tokens * self.model.hidden_size * self.value

    def _decision(self, *, keeps: bool = False) -> float:
        """Experts and gates of each assignment, and whether it was kept."""
        tokens = self.outside if self.layout.sequence_parallel else self.tokens
        return tokens * self.model.moe.top_k * (INT + (FLOAT if self._routes_in_kernel else 0) + keeps)

    @property
    def _routes_in_kernel(self) -> bool:
        """moe.router.ROUTE."""
        moe = self.model.moe
        chosen = moe.load_balancing in ("sinkhorn", "expert_choice") or moe.num_expert_groups > 1
        return self.on_gpu and not chosen and moe.score_function in ("softmax", "sigmoid")

    def _router(self) -> float:
        moe, d = self.model.moe, self.model.hidden_size
        tokens = self.outside
        scores = 1 if self._routes_in_kernel else 4 if moe.score_function == "sigmoid" else 2
        kept = tokens * FLOAT * scores * moe.num_experts + self._decision()
        kept += 0 if self._routes_in_kernel else tokens * (FLOAT * moe.top_k + 2 * FLOAT)
        if moe.jitter:  # noise, and its product with the tokens, of which then no one else keeps the original
            kept += tokens * d * (2 * FLOAT - (0 if self._keeps_tokens else self.value))
        return kept

    @property
    def _keeps_tokens(self) -> bool:
        """Whether something else than the router keeps the sparse layer's input."""
        return bool(self.model.moe.num_shared_experts) or (self.stays and self._gathers_in_kernel)

    @property
    def _gathers_in_kernel(self) -> bool:
        """Whether the experts' products read tokens from where they lie."""
        return (not self._experts_are_adapted and self.backend in ("triton", "grouped_mm_fused", "native")) or (
            self.backend == "fp8" and self.on_gpu
        )

    def _experts(self, again: list[str]) -> float:
        """Rows, what is computed of them, and which rows they are."""
        model, moe, value = self.model, self.model.moe, self.value
        d, width = model.hidden_size, model.expert_width / self.layout.etp
        rows, sent = self.rows, self.sent
        inputs = rows
        if self._gathers_in_kernel:
            inputs = (
                0.0 if self.stays else self.tokens / self.layout.tp * self.layout.ep if self.by_all_gather else rows
            )
        returned = rows if self.stays or self.by_all_gather else sent
        separate, adapted = self.is_separate, share_adapted(self.config, "ffn.experts", sparse=True)
        hidden = self._hidden(again, adapted) if separate else input_projections(model.activation)
        if self._experts_are_adapted and "activation" in again:
            # The second product's output, and what the adapters add to it.
            returned += (1 + adapted.get("down", 0.0)) * rows
        elif separate and "activation" in again and (returned is sent or self.backend == "loop"):
            returned += rows  # the second product's output is saved as well, and is not what travels back
        elif self._experts_are_adapted and self.backend in IN_FP32:
            # All but what the second product reads.
            hidden += (FLOAT / value - 1) * max(hidden - 1, 1) + (hidden == 1)
        if not self.on_gpu and moe.gate_on == "output":
            returned += rows if self.stays or self.by_all_gather else sent  # index_add saves what it adds
        if moe.expert_chunk_rows is not None and rows > moe.expert_chunk_rows:
            hidden = 0.0  # InPieces keeps its input
        if moe.expert_dropout:
            hidden += 2 if separate else 1
        indices = 2 * INT * sent if self.stays else 4 * INT * rows if not self.by_all_gather else INT * rows
        return value * (d * (inputs + returned) + rows * hidden * width) + indices

    @property
    def _trains_weights(self) -> bool:
        """False: of the model's own weights there are no gradients, but of adapters'."""
        return self.config.lora.rank is None

    @property
    def _keeps_head_input(self) -> bool:
        return self._trains_weights or self.model.reward_head

    @property
    def _experts_are_adapted(self) -> bool:
        return experts_are_adapted(self.config)

    @property
    def is_separate(self) -> bool:
        """Whether products and activation of the experts are operations of their own."""
        return self.backend in SEPARATE or self._experts_are_adapted

    def _hidden(self, again: list[str], adapted: Mapping[str, float] | None = None) -> float:
        """Tensors of hidden width of separate products and activation.

        Args:
            adapted: from share_adapted.
        """
        activation = self.model.activation
        gates = input_projections(activation)
        if "activation" in again:  # the products alone, also those of adapters
            return gates + sum((adapted or {}).get(part, 0.0) for part in ("gate", "up"))
        # Of a gated one both parts, the activated one and the product; clamped_swiglu adds 1 to the other one.
        return {"relu": 1, "clamped_swiglu": 5}.get(activation, 2 * gates)

    def _mlp(self, width: int, again: list[str], name: str) -> float:
        """name: of the layer, for lora.target."""
        model, adapted = self.model, share_adapted(self.config, name, sparse=name != "ffn")
        kept = self.tokens * self.value * self._hidden(again, adapted) * width / self.layout.tp
        if "activation" in again:  # the second product's output as well
            kept += self.tokens * self.value * model.hidden_size * (1 + adapted.get("down", 0.0))
        if width == model.shared_width and model.moe.shared_expert_gate:
            kept += self.outside * self.value * model.hidden_size
        return kept
