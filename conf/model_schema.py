"""The settings of a model, as conf/schema.py has those of a whole run, and which of them may change once weights are
trained. Imports nothing of the project and nothing heavy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "relu2")
AUX_LOSS_COUNTS = ("scores", "assignments")
BACKENDS = ("auto", "loop", "fused", "native", "grouped_mm", "triton", "te")
CAPACITY_PER = ("micro_batch", "sequence")
DISPATCHERS = ("auto", "all_to_all", "all_gather", "deep_ep")
DROP_POLICIES = ("position", "probability", "random")
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "expert_choice")
QK_NORMS = (None, "head", "full")
RECOMPUTE = ("norm", "activation", "moe", "full")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
SOFTMAX_ORDERS = ("before", "after")

Change = Callable[[Any, Any], bool]
"""(old value, new value) of a setting -> whether trained weights go on to mean the same."""


def _any(old: Any, new: Any) -> bool:
    return True


def resumable(default: Any, when: Change = _any) -> Any:
    """The default of a model setting with which trained weights go on to mean the same: it says how they are computed
    with or trained, so that a run may be continued, or started from another run's weights (checkpoint.load), with
    another value. Every other setting of the model must then be as it was.

    Args:
        when: which changes are such.
    """
    return field(default=default, metadata={"resumable": when})


@dataclass
class MoeConfig:
    """The sparse layers. Names follow Switch Transformers (Fedus et al. 2021, arXiv:2101.03961)."""

    num_experts: int = 0
    """Experts in a sparse layer; 0 makes every layer dense."""
    ffn_hidden_size: int | None = None
    """Hidden width of an expert (Qwen3-MoE, arXiv:2505.09388: 768, where a dense layer would have 6144). null:
    model.ffn_hidden_size."""
    shared_ffn_hidden_size: int | None = None
    """Hidden width of a shared expert (Qwen2-MoE: 20480 beside experts of 2560). null: that of an expert."""
    every: int = 1
    """1: experts in every layer; 2: in every second one (layers 1, 3, 5, ..., counted from 0), and so on."""
    first_dense_layers: int = 0
    """So many first layers are dense, whatever `every` says (DeepSeek-V3, arXiv:2412.19437, section 4.2: 3)."""
    top_k: int = 1
    """Experts that a token visits."""
    score_function: str = "softmax"
    """What makes scores of the router's logits: softmax over all experts (Switch, eq. 1), or sigmoid, where each
    expert is judged alone (DeepSeek-V3, arXiv:2412.19437, eq. 15). The load-balancing loss and the entropy in the log
    take sigmoid scores divided by their sum over all experts (eq. 19)."""
    softmax_order: str = "before"
    """before: softmax over all experts, then the choice. after: the choice by logits, then softmax over the chosen
    ones alone (Mixtral, arXiv:2401.04088, section 2.1). Mathematically that is before with renormalize=true, but the
    choice is exact where probabilities are too small to tell apart. Needs top_k > 1, as a softmax over one logit is
    the constant 1 and the router would get no gradient."""
    renormalize: bool | None = None
    """Divide a token's k chosen scores by their sum (softmax: Qwen3-MoE; sigmoid: DeepSeek-V3, eq. 13). null: only
    when top_k > 1, since at top_k = 1 the gate would be the constant 1 and the router would get no gradient."""
    routed_scaling_factor: float = 1.0
    """Multiplies the gates, after any renormalisation (2.5 in DeepSeek-V3)."""
    num_expert_groups: int = 1
    """Groups of consecutive experts among which a token first chooses top_k_groups groups, and then its experts within
    these (DeepSeek-V3, section 2.1.2: a group per node bounds the nodes that a token travels to). A group's score is
    the sum of its two best experts' scores. 1: no groups."""
    top_k_groups: int = 1
    """Groups that a token may use. Needs num_expert_groups > 1."""
    capacity_factor: float | None = resumable(1.25)
    """An expert takes at most ceil(capacity_factor * tokens * top_k / num_experts) choices of a micro-batch while
    training; tokens past that are dropped: they pass through the residual alone. null: dropless. With
    load_balancing=expert_choice every expert takes just so many, in evaluation too."""
    eval_capacity_factor: float | None = resumable(2.0)
    """The same for evaluation. Text generation is always dropless."""
    capacity_per: str = resumable("micro_batch")
    """Whose tokens the two capacities count. micro_batch: an expert's room is shared by all sequences of a micro-batch
    (Switch, eq. 3). sequence: each sequence has its own, so that its drops do not depend on the other sequences (Mesh
    TensorFlow, and the Switch of Transformers)."""
    drop_policy: str = resumable("position")
    """Which choices a full expert takes. position: first choices before second ones, earlier tokens before later ones
    (Switch, section 2.2). probability: those with the largest gates, among equals by position; a token's fate then
    hangs on later tokens even at top_k = 1. (Batch prioritised routing, Riquelme et al. 2021, arXiv:2106.05974,
    section 4.1, orders whole tokens by their largest gate instead of each expert's choices.) random: drawn anew for
    every choice, step and layer, the same under every layout."""
    load_balancing: str = resumable("aux_loss", lambda old, new: "expert_choice" not in (old, new))
    """What keeps the experts evenly loaded, named as in Megatron-Core. By a loss on the router: aux_loss, over the
    tokens of a micro-batch (Switch, eq. 4 to 6); seq_aux_loss, over those of each sequence, the losses then averaged
    (DeepSeek-V3, eq. 17 to 20); global_aux_loss, the probabilities of a micro-batch against the loads of the whole
    previous optimizer step (before the first one they count as even, and the loss pushes nowhere). By the choice
    itself, without a loss: sinkhorn, a token's best experts in a balanced transport plan over the micro-batch while
    training, and by its own logits otherwise (S-BASE, Clark et al. 2022, arXiv:2202.01169); expert_choice, each expert
    takes its best tokens of the micro-batch, top_k * capacity_factor experts per token on average (Zhou et al. 2022,
    arXiv:2202.09368). An expert that chooses looks at later tokens, which a causal model must not: held-out losses come
    out too low, and no text can be generated."""
    aux_loss_coeff: float = resumable(1e-2)
    """Weight of the load-balancing loss; 0 only measures it. The loss of a layer is the mean over its assignments, 1
    when they are uniform whatever top_k, and layers are added up. Megatron-Core does the same: take its coefficient
    over. Transformers counts a token top_k times and pools the L sparse layers: multiply its coefficient by top_k / L.
    flaxformer counts a token top_k times, in each sequence: seq_aux_loss with its coefficient times top_k."""
    aux_loss_counts: str = resumable("scores")
    """What the load-balancing losses take for an expert's load where bias_update_rate or num_expert_groups moves the
    choice. scores: how often it is among the top_k of the scores without bias and groups (DeepSeek-V3, eq. 18, and
    Megatron-Core). assignments: how often it is chosen."""
    bias_update_rate: float | None = resumable(None, lambda old, new: new is not None or not old)
    """Balancing without a loss: a bias of each expert, added to its score for the choice alone, grows by this much
    after a step in which the expert got fewer choices than the mean and shrinks by it after more (DeepSeek-V3, eq. 16
    and section 2.1.2; Wang et al. 2024, arXiv:2408.15664, algorithm 1; 0.001 there). 0: the bias stays as it is, as it
    was trained before (there, for the last part of the training). null: no bias. Goes with or without aux_loss_coeff.
    Needs softmax_order=before."""
    z_loss_coeff: float = resumable(1e-3)
    """Weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5)."""
    jitter: float = resumable(0.0)
    """While training, every value that a router sees is multiplied by a random number between 1 - jitter and
    1 + jitter (Switch, section 2.4; 0.01 there), so that the choice explores. In [0, 1); 0: none."""
    dispatcher: str = resumable("auto")
    """How rows reach experts on other ranks (parallel.ep > 1). all_to_all: each row to the rank of its expert.
    all_gather: every rank gets all tokens and adds its experts' part; moves less where top_k exceeds ep.
    deep_ep: the package DeepEP (GPUs, bf16, etp=1, no pad_to_capacity, no expert_dropout). auto: DeepEP where it is
    installed and has reproduced all_to_all on a random batch, else the one of the first two that moves less."""
    pad_to_capacity: bool = resumable(False)
    """Every expert gets its capacity of rows, zeros where fewer chose it: the sizes are known beforehand, so that the
    host need not wait for the device, and results are the same. A micro-batch that is cut over n ranks is padded by
    each of them, up to n times in all. Needs a capacity factor; evaluation follows eval_capacity_factor."""
    num_shared_experts: int = 0
    """Experts that every token visits besides its top_k, computed while rows travel (DeepSeekMoE, arXiv:2401.06066,
    section 3.2). They are one dense layer of num_shared_experts * shared_ffn_hidden_size."""
    shared_expert_gate: bool = False
    """Each token scales the shared experts' answer by sigmoid(x . g), g trained (Qwen2-MoE)."""
    expert_bias: bool = False
    """Each expert's two projections have a bias, zero at first and without weight decay. Dense feed-forward layers have
    none."""
    expert_dropout: float = resumable(0.0)
    """Share of an expert's hidden units dropped in training: against overfitting when a sparse model is trained further
    on little data (Switch, section 2.4; 0.4 there). The shared experts have none."""
    expert_chunk_rows: int | None = resumable(None)
    """Experts compute at most this many rows at a time, and compute them again in the backward pass: a bound on the
    memory of their hidden width when one expert gets many of the tokens of a dropless model. (A capacity factor bounds
    the rows themselves.) null: all rows at once."""
    backend: str = resumable("auto")
    """How the experts' matrix products run: auto, loop (one product per expert), fused (the loop as one operation,
    which keeps less), native (ours, bf16 on a CPU with AVX512-BF16), grouped_mm (torch's one launch for all), triton
    (ours, bf16 on a GPU) or te (TransformerEngine's, where it is installed). Of the layers that precision=fp8 leaves in
    bf16; those in FP8 have fp8.kernels."""


@dataclass
class ModelConfig:
    """A decoder-only transformer with pre-normalisation, rotary positions and grouped-query attention."""

    name: str = resumable("custom")
    """Shown in tables and used in the default run name."""
    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads."""
    head_dim: int | None = None
    """Width of a head, an even number (Qwen3-MoE, arXiv:2505.09388: 32 heads of 128 at hidden_size 2048). null:
    hidden_size / num_attention_heads, which must then divide."""
    num_query_groups: int | None = None
    """Key/value heads; null: as many as attention heads."""
    ffn_hidden_size: int = 512
    """Hidden width of the dense feed-forward layers, and of the experts where model.moe gives none."""
    qk_norm: str | None = None
    """RMSNorm of queries and keys before their rotation, with norm_eps. head: over each head, with one weight for all
    query heads and one for all key heads (Qwen3, arXiv:2505.09388, section 2). full: over all query heads together and
    over all key heads together (OLMoE, arXiv:2409.02060, section 2), which costs a small message a layer and
    direction under parallel.tp. null: none."""
    attention_bias: bool = False
    """The projections to queries, keys and values have biases, zero at first and without weight decay (Qwen2,
    arXiv:2407.10671, section 2.2.1). The output projection has none."""
    clip_qkv: float | None = None
    """Queries, keys and values are kept within [-clip_qkv, clip_qkv], after qk_norm and before the rotation (MPT and
    DBRX, 8 in the latter; OLMo, arXiv:2402.00838). null: no bound."""
    activation: str = "geglu"
    """swiglu, geglu (gated: two input projections), gelu, relu or relu2 (squared ReLU; Primer, arXiv:2109.08668)."""
    vocab_size: int = 4096
    """Rows of the embedding. Also the size of the tokenizer when one is trained on the corpus."""
    tie_embeddings: bool = False
    """The output layer uses the embedding's weights."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's frequencies (RoFormer, arXiv:2104.09864)."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_scale: float = resumable(0.1)
    """s of the normal distribution with standard deviation sqrt(s / fan_in), cut at two of them; Switch, section 2.4,
    reduces the transformer's usual 1.0 tenfold for stability."""
    recompute: list[str] = field(default_factory=list, metadata={"resumable": _any})
    """What is computed again in the backward pass instead of being kept: norm (the outputs of the norms),
    activation (between the two products of feed-forward layers and experts), moe (the whole sparse layer), full (the
    whole block; goes alone). A router's choice is always kept, never taken again."""
    moe: MoeConfig = field(default_factory=MoeConfig)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        moe = self.moe
        return moe.num_experts > 0 and layer >= moe.first_dense_layers and layer % moe.every == moe.every - 1

    @property
    def sparse_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_sparse(layer)]

    @property
    def head_width(self) -> int:
        """head_dim with null written out."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def expert_width(self) -> int:
        """moe.ffn_hidden_size with null written out."""
        return self.moe.ffn_hidden_size or self.ffn_hidden_size

    @property
    def shared_width(self) -> int:
        """Of all shared experts together."""
        return self.moe.num_shared_experts * (self.moe.shared_ffn_hidden_size or self.expert_width)

    @property
    def query_groups(self) -> int:
        """num_query_groups with null written out."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Of all query heads together."""
        return self.num_attention_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Of all key heads together, and of all value heads."""
        return self.query_groups * self.head_width
