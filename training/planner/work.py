"""What a pipeline stage does in one micro-batch, and how long each part of it takes.

Legend: T tokens of a micro-batch on a rank (those of its context-parallel slice), D hidden size, R rows of a rank's
experts.
"""

from collections import Counter
from dataclasses import dataclass

from conf.extensions import input_projections
from conf.schema import Config
from parallel.layout import Layout
from training.adapters import adapter_parameters
from training.flops import attention_span, experts_per_token
from training.memory_estimate import Stage, matrices, stage_parameters
from training.planner.links import Links
from training.planner.rates import Rates

Parts = Counter[str]
"""Seconds by what they are spent on."""
PASS_EFFICIENCY = 0.5
"""Share of a copy's bandwidth that passes over activations and gradients reach."""
ROTARY, ROTARY_FUSED = 15, 2
"""bf16 values read and written for each one that is rotated: in PyTorch's operations, in fp32; and in one kernel."""
GATED, GATED_FUSED = (5, 14), (3, 5)
"""Passes over the hidden width of a gated activation, forward and backward: of autograd; and in one kernel each, which
reads both parts and writes their product, and reads its gradient and both and writes theirs."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a micro-batch on a stage, by part, all of its chunks together."""

    forward: Parts
    backward: Parts
    host: float
    """What the host takes to launch both."""

    @property
    def total(self) -> float:
        """Whichever is slower, GPU or host."""
        return max(self.forward.total() + self.backward.total(), self.host)


def stage_times(
    config: Config,
    layout: Layout,
    stage: Stage,
    rates: Rates,
    links: Links,
    imbalance: float,
    *,
    fused: bool = False,
) -> StageTimes:
    """The times of the rank with most rows.

    Args:
        imbalance: its experts' rows relative to the mean.
        fused: with kernels for rotary embeddings and activations, and products that add to the gradient buffer, as
            TransformerEngine's.
    """
    stage_work = _Stage(config, layout, stage, rates, links, imbalance, fused)
    return stage_work.times()


def exposed(way: float, experts: float, parts: int) -> float:
    """Seconds of a layer's two all-to-alls that its experts do not hide if rows travel in parts (moe.layer): one part
    arrives after the other, each is computed once it is there, and its answers follow the last arrival.

    Args:
        way: seconds of one all-to-all of all rows.
        experts: seconds to compute all rows.
    """
    computed, back = 0.0, way
    for part in range(1, parts + 1):
        computed = max(computed, way * part / parts) + experts / parts
        back = max(back, computed) + way / parts
    return back - experts


class _Stage:
    def __init__(
        self,
        config: Config,
        layout: Layout,
        stage: Stage,
        rates: Rates,
        links: Links,
        imbalance: float,
        fused: bool,
    ):
        self.fused = fused
        self.config, self.layout, self.rates, self.links = config, layout, rates, links
        self.model = config.model
        self.trained = config.lora.rank is None
        """Whether the model's weights are trained, not adapters of them."""
        self.stage = stage
        self.sparse, self.dense = stage.sparse, stage.dense
        train = config.train
        self.tokens = train.micro_batch_size * train.sequence_length / layout.cp
        self.fp8 = config.precision == "fp8"
        moe = self.model.moe
        local = max(moe.num_experts / layout.ep, 1)
        self.rows = self.tokens / layout.tp * experts_per_token(self.model) * layout.etp * imbalance
        self.rows_per_expert = self.rows / local
        self.forward: Parts = Counter()
        self.backward: Parts = Counter()

    def times(self) -> StageTimes:
        self._linear()
        self._experts()
        self._adapters()
        self._attention()
        self._passes()
        self._collectives()
        if self.stage.is_last:
            self._head()
        self._recompute()
        self._accumulate()
        host = self.rates.host
        again = 1.5 if "full" in self.model.recompute else 1.2 if self.model.recompute else 1.0
        launch = (self.sparse * host["sparse"] + self.dense * host["dense"]) * again
        return StageTimes(self.forward, self.backward, launch)

    def _linear(self) -> None:
        linear, _ = matrices(self.model, self.layout, self.sparse, self.dense)
        fp8 = self.fp8 and self.config.fp8.linear_layers
        for count, inner, outer in linear:
            if not count * inner * outer:
                continue
            one = self.rates.dense(self.tokens, inner, outer, fp8=fp8)
            self.forward["linear layers"] += count * one
            weight = self.rates.dense(self.tokens, inner, outer) if self.trained else 0.0
            self.backward["linear layers"] += count * (one + weight)

    def _experts(self) -> None:
        _, experts = matrices(self.model, self.layout, self.sparse, self.dense)
        for count, inner, outer in experts:
            if not count:
                continue
            one = self.rates.grouped(count, self.rows_per_expert, inner, outer, fp8=self.fp8)
            weight = 0.0
            if self.trained:
                weight = self.rates.grouped_weight_gradient(count, self.rows_per_expert, inner, outer)
            self.forward["experts"] += one
            self.backward["experts"] += one + weight

    def _adapters(self) -> None:
        """Of each, two narrow products forward and four backward, bound by memory: they read and write the layer's
        input and output once each, and twice backward."""
        spread, experts = self._adapted_widths()
        values = self.tokens * spread + self.rows * experts
        if values:
            self.forward["adapters"] += self._pass(values)
            self.backward["adapters"] += self._pass(2 * values)

    def _adapted_widths(self) -> tuple[float, float]:
        """Inner and outer dimensions of the adapted layers of a stage, added up: (of tokens, of experts' rows)."""
        rank = self.config.lora.rank
        if rank is None:
            return 0.0, 0.0
        layout = self.layout
        spread, experts = adapter_parameters(self.config, layout, self.stage)
        local = max(self.model.moe.num_experts / layout.ep, 1)
        return spread / rank, experts / rank / local

    def _attention(self) -> None:
        model, train, layout = self.model, self.config.train, self.layout
        widths = (model.query_width + model.output_width) / layout.tp
        # Causal: half of the products of all queries with all keys (and values), two FLOPs each, twice.
        layers = model.num_layers + model.mtp_num_layers
        span = attention_span(model, train.sequence_length) / layers  # the sequence, or less in local layers
        flops = train.micro_batch_size * train.sequence_length * span / layout.cp * widths * (self.sparse + self.dense)
        head, sequence = model.head_width, train.sequence_length
        self.forward["attention"] += self.rates.attention(flops, head, sequence)
        self.backward["attention"] += self.rates.attention(flops, head, sequence, backward=True)

    def _pass(self, values: float) -> float:
        """Seconds to read or write bf16 values."""
        return 2 * values / (self.rates.memory * PASS_EFFICIENCY)

    def _passes(self) -> None:
        """Norms, rotary embeddings, residuals, activations and the permutation of rows: bound by memory. Counted are
        the values that PyTorch's operations and our kernels read and write."""
        model, layout, layers = self.model, self.layout, self.sparse + self.dense
        tp = layout.tp
        outside = model.hidden_size / (tp if layout.sequence_parallel else 1)
        q, k = model.query_width / tp, model.key_width / tp
        gates = input_projections(model.activation)
        # Two norms (each read and written), two residuals (two read, one written); projections are split and laid out
        # for attention, in latent attention with values padded to the width of keys, unless kernels take other values.
        value = model.output_width / tp if self.fused and model.kv_lora_rank is not None else k
        block = 10 * outside + 2 * (q + k + value) + self._rotated(q, k) + (2 * (q + k) if model.qk_norm else 0)
        if model.attention_output_gate is not None:  # the sigmoid, and its product with what is attended to
            block += (3 * model.gate_width + 2 * model.query_width) / tp
        hidden = self.tokens * (self.dense * model.ffn_hidden_size + self.sparse * model.shared_width) / tp
        hidden += self.sparse * self.rows * model.expert_width / layout.etp
        router = 4 * model.hidden_size / tp
        # Rows are read and written before the experts and after them, and once more if gates multiply their inputs.
        permuted = self.sparse * self.rows * (6 if model.moe.gate_on == "input" else 4) * model.hidden_size
        values = self.tokens * (layers * block + self.sparse * router) + permuted
        gated = GATED_FUSED if self.fused else GATED
        forward, backward = gated if gates == 2 else (2, 3)
        self.forward["passes over memory"] += self._pass(values + forward * hidden)
        self.backward["passes over memory"] += self._pass(2 * values + backward * hidden)

    def _rotated(self, query: float, key: float) -> float:
        """Values of a token that rotary embeddings read and write, of queries and keys of these widths: of the rotated
        dimensions, in fp32 without a kernel. In latent attention all heads share the rotated dimensions of a key."""
        rotary = ROTARY_FUSED if self.fused else ROTARY
        share = self.model.rotary_width / self.model.head_width
        if self.model.kv_lora_rank is not None:
            key = self.model.head_width
        return rotary * share * (query + key)

    def _collectives(self) -> None:
        model, layout, links = self.model, self.layout, self.links
        layers = self.sparse + self.dense
        whole = 2 * self.tokens * model.hidden_size
        # A tensor-parallel block gathers its input and scatters its output (or reduces it, which is both); so does a
        # dense feed-forward layer, and the shared experts. The backward pass gathers the input once more.
        shared = self.sparse if model.shared_width else 0
        one = links.ring("tp", whole)
        blocks = layers + self.dense + shared
        self.forward["tensor parallel"] += 2 * one * blocks
        self.backward["tensor parallel"] += (3 if layout.sequence_parallel else 2) * one * blocks
        keys = links.ring("cp", 2 * 2 * self.tokens * layout.cp * model.key_width / layout.tp) * layers
        self.forward["context parallel"] += keys
        self.backward["context parallel"] += keys
        sent = 2 * self.rows / layout.etp * model.hidden_size
        if model.moe.dispatcher == "deep_ep":
            visited = experts_per_token(model)
            each = links.dispatch(sent / (2 * model.hidden_size * visited), visited, 2 * model.hidden_size)
        else:
            each = links.all_to_all("ep", sent)
        over_etp = 2 * links.ring("etp", sent * layout.etp)
        for part in (self.forward, self.backward):
            of_layer = part["experts"] / max(1, self.sparse)
            part["all-to-all"] += (exposed(each, of_layer, model.moe.overlap_degree) + over_etp) * self.sparse

    def _head(self) -> None:
        model, tp = self.model, self.layout.tp
        predictions = 1 + model.mtp_num_layers
        outputs = 1 if model.reward_head else model.vocab_size / tp
        one = self.rates.dense(self.tokens, model.hidden_size, outputs)
        loss = self._pass(self.tokens * outputs * 1.5)
        self.forward["head"] += predictions * (one + loss)
        self.backward["head"] += predictions * ((2 if self.trained else 1) * one + loss)
        if model.mtp_num_layers:
            tokens = self.tokens / (tp if self.layout.sequence_parallel else 1)
            joined = model.mtp_num_layers * self.rates.dense(tokens, 2 * model.hidden_size, model.hidden_size)
            self.forward["linear layers"] += joined
            self.backward["linear layers"] += 2 * joined

    def _recompute(self) -> None:
        again: Parts = Counter()
        recompute, forward = self.model.recompute, self.forward
        if "full" in recompute:
            again = Counter({part: seconds for part, seconds in forward.items() if part != "head"})
        else:
            if "moe" in recompute:
                again += Counter({part: forward[part] for part in ("experts", "all-to-all")})
            if "norm" in recompute or "activation" in recompute:
                again += Counter({"passes over memory": 0.3 * forward["passes over memory"]})
        self.backward["recompute"] += again.total()

    def _accumulate(self) -> None:
        """A weight gradient is read, and added to the gradient buffer; fused, the product adds it itself."""
        spread, experts = stage_parameters(self.model, self.layout, self.stage)
        if not self.trained:
            spread, experts = adapter_parameters(self.config, self.layout, self.stage)
        kept = 2 if self.config.optim.grad_dtype == "bf16" else 4
        moved = (spread + experts) * 2 * kept
        if not self.fused:
            moved += 2 * (spread + experts) + 4 * experts  # grouped_mm's gradient is laid out anew
        self.backward["gradient accumulation"] += moved / (self.rates.memory * 0.65)
