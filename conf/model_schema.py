"""The typed settings of a model, with their units and defaults, and which of them may change once weights are trained.

Nothing heavy is imported here, as in conf/schema.py.
"""

from dataclasses import dataclass, field

from conf.rope_schema import RopeScalingConfig
from conf.setting import setting

GATED_ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu")
DROP_POLICIES = ("position", "probability", "random")
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "expert_choice")
RECOMPUTE = ("norm", "activation", "moe", "full")


@dataclass
class MoeConfig:
    """Mixture-of-experts layers. Names follow Switch Transformers (Fedus et al. 2021, arXiv:2101.03961)."""

    num_experts: int = setting(0, ge=0)
    """Number of experts per sparse layer. 0: all layers are dense."""
    ffn_hidden_size: int | None = setting(None, ge=1)
    """Hidden size of each expert (Qwen3-MoE, arXiv:2505.09388: 768, against 6144 in a dense layer). null:
    model.ffn_hidden_size."""
    shared_ffn_hidden_size: int | None = setting(None, ge=1)
    """Hidden size of each shared expert (Qwen2-MoE: 20480, against 2560 of a routed expert). null: that of an
    expert."""
    every: int = setting(1, ge=1)
    """Interval of the sparse layers. 1: every layer is sparse. 2: every second one (layers 1, 3, 5, ..., counted from
    0), and so on."""
    first_dense_layers: int = setting(0, ge=0)
    """Number of layers at the beginning of the model that are dense, regardless of `every` (DeepSeek-V3,
    arXiv:2412.19437, section 4.2: 3)."""
    top_k: int = setting(1, ge=1)
    """Number of experts that each token is routed to."""
    score_function: str = setting("softmax", choices=("softmax", "sigmoid"))
    """How router logits become scores: softmax or sigmoid. softmax: over all experts (Switch, eq. 1). sigmoid: of each
    expert independently (DeepSeek-V3, arXiv:2412.19437, eq. 15); the load-balancing loss and the logged entropy then
    use the scores divided by their sum over all experts (eq. 19)."""
    softmax_order: str = setting("before", choices=("before", "after"))
    """Whether the softmax is taken before or after the top-k selection. before: over all experts. after: over the
    selected logits only (Mixtral, arXiv:2401.04088, section 2.1). This is mathematically the same as before with
    renormalize=true, but selects exactly where probabilities underflow. Needs top_k > 1: the softmax of one logit is
    the constant 1, which gives the router no gradient."""
    renormalize: bool | None = None
    """Divide the top-k scores of a token by their sum (softmax: Qwen3-MoE; sigmoid: DeepSeek-V3, eq. 13). null: if
    top_k > 1; with top_k = 1 the gate would be the constant 1, which gives the router no gradient."""
    routed_scaling_factor: float = setting(1.0, gt=0)
    """Factor applied to the gates after renormalisation (DeepSeek-V3: 2.5)."""
    sparse_mixer_eps: float | None = setting(None, gt=0)
    """Gates by SparseMixer (arXiv:2310.00811; GRIN, arXiv:2409.12136; Phi-3.5-MoE, arXiv:2404.14219: 0.01) in its
    deterministic form, that of evaluation. A token's experts are taken in turn. An expert's gate is its share in the
    softmax over the experts that are not taken yet and whose logits z are near the largest of theirs, m: (m - z) /
    max(|z|, m) <= 2 * sparse_mixer_eps. Where no other is near, the gate is 1, without a gradient; the sampled experts
    and the estimated gradients of its training are not there. null: none."""
    gate_on: str = setting("output", choices=("output", "input"))
    """Whether the gate multiplies an expert's output or its input (Llama 4: input)."""
    num_expert_groups: int = setting(1, ge=1)
    """Number of groups of consecutive experts for group-limited routing: a token selects top_k_groups groups, then its
    experts within these (DeepSeek-V3, section 2.1.2, with one group per node to limit the nodes per token). 1: no
    groups."""
    top_k_groups: int = setting(1, ge=1)
    """Number of groups that a token may use. Needs num_expert_groups > 1."""
    group_score: str = setting("top2", choices=("top2", "max"))
    """Score of a group of experts. top2: the sum of its two highest expert scores (DeepSeek-V3, section 2.1.2). max:
    its highest expert score (DeepSeek-V2, arXiv:2405.04434, section 2.2.2). Needs num_expert_groups > 1."""
    capacity_factor: float | None = setting(1.25, gt=0, resumable=True)
    """Expert capacity in training: an expert accepts at most ceil(capacity_factor * tokens * top_k / num_experts)
    assignments of a micro-batch. Assignments beyond that are dropped; the token is then carried by the residual
    connection alone. null: dropless. With load_balancing=expert_choice every expert takes exactly this many tokens, in
    evaluation too."""
    eval_capacity_factor: float | None = setting(2.0, gt=0, resumable=True)
    """Capacity factor in evaluation. null: dropless. Text generation is always dropless."""
    capacity_per: str = setting("micro_batch", choices=("micro_batch", "sequence"), resumable=True)
    """Tokens that the capacity is computed from: micro_batch or sequence. micro_batch: all sequences of a micro-batch
    share the capacity (Switch, eq. 3). sequence: each sequence has its own capacity, so that its drops do not depend on
    other sequences (Mesh TensorFlow, Switch in Transformers)."""
    drop_policy: str = setting("position", choices=DROP_POLICIES, resumable=True)
    """Which assignments an expert at capacity keeps: position, probability or random. position: first choices before
    second choices, then earlier tokens before later ones (Switch, section 2.2). probability: the largest gates, ties by
    position; whether a token is dropped then depends on later tokens even at top_k = 1. (Batch prioritised routing,
    Riquelme et al. 2021, arXiv:2106.05974, section 4.1, orders whole tokens by their largest gate instead of the
    assignments of each expert.) random: drawn independently for every assignment, step and layer, the same under every
    layout."""
    load_balancing: str = setting(
        "aux_loss", choices=LOAD_BALANCING, resumable=lambda old, new: "expert_choice" not in (old, new)
    )
    """Load-balancing method, named as in Megatron-Core. Auxiliary losses: aux_loss, over the tokens of a micro-batch
    (Switch, eq. 4 to 6); seq_aux_loss, over the tokens of each sequence, averaged over sequences (DeepSeek-V3, eq. 17
    to 20); global_aux_loss, the probabilities of a micro-batch against the loads of the whole previous optimizer step
    (uniform before the first one, so that the loss has no gradient there). Balanced assignment, without a loss:
    sinkhorn, the top-k of a balanced transport plan over the micro-batch in training, of the logits otherwise (S-BASE,
    Clark et al. 2022, arXiv:2202.01169); expert_choice, each expert selects its top tokens of the micro-batch, top_k *
    capacity_factor experts per token on average (Zhou et al. 2022, arXiv:2202.09368). expert_choice is not causal: it
    looks at later tokens, so that held-out losses are too low and no text can be generated."""
    aux_loss_coeff: float = setting(1e-2, ge=0, resumable=True)
    """Coefficient of the load-balancing loss. 0: the loss is only measured. A layer's loss is the mean over its
    assignments, 1 for uniform loads at any top_k, and is summed over layers, as in Megatron-Core, whose coefficients
    apply unchanged. Transformers counts a token top_k times and pools the L sparse layers: multiply its coefficient by
    top_k / L. flaxformer counts a token top_k times in each sequence: use seq_aux_loss and multiply its coefficient by
    top_k."""
    aux_loss_counts: str = setting("scores", choices=("scores", "assignments"), resumable=True)
    """Expert loads in the load-balancing losses if bias_update_rate or num_expert_groups changes the selection: scores
    or assignments. scores: how often an expert is in the top-k of the scores without bias and groups (DeepSeek-V3, eq.
    18, and Megatron-Core). assignments: how often it is selected."""
    bias_update_rate: float | None = setting(None, ge=0, resumable=lambda old, new: new is not None or not old)
    """Step size of auxiliary-loss-free balancing: a bias per expert, added to its score for the selection only, is
    increased by this value after a step in which the expert's load is below the mean and decreased if it is above
    (DeepSeek-V3, eq. 16 and section 2.1.2; Wang et al. 2024, arXiv:2408.15664, algorithm 1; both 0.001). 0: keep a
    trained bias constant (DeepSeek-V3's last training phase). null: no bias. Independent of aux_loss_coeff. Needs
    softmax_order=before."""
    z_loss_coeff: float = setting(1e-3, ge=0, resumable=True)
    """Coefficient of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5)."""
    jitter: float = setting(0.0, ge=0, lt=1, resumable=True)
    """Input jitter: in training, every element of the router's input is multiplied by a random number between 1 -
    jitter and 1 + jitter (Switch, section 2.4: 0.01). In [0, 1). 0: none."""
    force_balance: bool = setting(False, resumable=True)
    """Send the tokens to all experts in turn while training, whatever the router prefers, as most published speeds were
    measured. For benchmarks only: such a model learns no routing."""
    dispatcher: str = setting("auto", choices=("auto", "all_to_all", "all_gather", "deep_ep"), resumable=True)
    """How tokens are sent to experts on other ranks (parallel.ep > 1): auto, all_to_all, all_gather or deep_ep.
    all_to_all: each token to the ranks of its experts. all_gather: all tokens to all ranks, which add their experts'
    contributions; less traffic if top_k > ep. deep_ep: the DeepEP package (GPUs, bf16, etp=1, no pad_to_capacity, no
    expert_dropout). auto: DeepEP if it is installed and reproduces all_to_all on a random batch, else whichever of the
    first two has less traffic."""
    pad_to_capacity: bool = setting(False, resumable=True)
    """Pad each expert's input to its capacity: sizes are then known in advance, so that the host does not wait for the
    device. The results are the same. If a micro-batch is sharded over n ranks, each of them pads, up to n times in
    total. Needs a capacity factor; evaluation uses eval_capacity_factor."""
    num_shared_experts: int = setting(0, ge=0)
    """Number of shared experts, which process every token besides its top_k experts and are computed during the
    dispatch (DeepSeekMoE, arXiv:2401.06066, section 3.2). They form one dense layer of hidden size num_shared_experts *
    shared_ffn_hidden_size."""
    shared_expert_gate: bool = False
    """Multiply the output of the shared experts by sigmoid(x . g) for each token x, with a trained vector g
    (Qwen2-MoE)."""
    expert_bias: bool = False
    """Add biases to the two linear layers of each expert, initialised to zero and without weight decay. Shared experts
    and dense feed-forward layers have them with model.ffn_bias."""
    router_bias: bool = False
    """Add a trained bias to the router's logits, initialised to zero and without weight decay (gpt-oss,
    arXiv:2508.10925). It is part of the scores, unlike the bias of bias_update_rate."""
    expert_dropout: float = setting(0.0, ge=0, lt=1, resumable=True)
    """Dropout probability of the hidden units of experts, against overfitting when a sparse model is fine-tuned on
    little data (Switch, section 2.4: 0.4). Not applied to shared experts."""
    expert_chunk_rows: int | None = setting(None, ge=1, resumable=True)
    """Maximum number of rows that experts process at a time; they are recomputed in the backward pass. This bounds the
    activation memory when many tokens of a dropless model go to one expert. (A capacity factor bounds the number of
    rows itself.) null: all rows at once."""
    backend: str = setting(
        "auto",
        choices=("auto", "loop", "fused", "native", "grouped_mm", "grouped_mm_fused", "triton", "te"),
        resumable=True,
    )
    """Implementation of the experts' matrix products: auto, loop, fused, native, grouped_mm, grouped_mm_fused, triton
    or te. loop: one product per expert. fused: the loop as one autograd function, which saves fewer activations.
    native: C++ (bf16 on CPUs with AVX512-BF16). grouped_mm: PyTorch's grouped product. grouped_mm_fused: the same with
    activations and weight gradients in Triton (bf16 on GPUs). triton: Triton (bf16 on GPUs). te: TransformerEngine, if
    installed. With precision=fp8 this applies to the layers that stay in bf16; see fp8.kernels for the others."""


@dataclass
class ModelConfig:
    """A decoder-only transformer with pre-normalisation, rotary position embeddings, and grouped-query or latent
    attention."""

    name: str = setting("custom", resumable=True)
    """Name of the model, shown in tables and part of the default run.dir."""
    num_layers: int = setting(4, ge=1)
    """Number of transformer layers."""
    hidden_size: int = setting(256, ge=1)
    """Hidden size of the transformer."""
    num_attention_heads: int = setting(4, ge=1)
    """Number of attention (query) heads."""
    head_dim: int | None = setting(None, ge=1)
    """Size of an attention head, an even number (Qwen3-MoE, arXiv:2505.09388: 32 heads of 128 at hidden_size 2048).
    null: hidden_size / num_attention_heads, which must be an integer."""
    num_query_groups: int | None = setting(None, ge=1)
    """Number of key/value heads (grouped-query attention). null: num_attention_heads."""
    kv_lora_rank: int | None = setting(None, ge=1)
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads are
    projected from one normalised vector of this size per token (DeepSeek-V3, arXiv:2412.19437: 512), plus one rotated
    key that all heads share. null: grouped-query attention. Excludes num_query_groups, head_dim, qk_norm,
    attention_bias, attention_output_bias, attention_sinks, clip_qkv and partial_rotary_factor."""
    q_lora_rank: int | None = setting(None, ge=1)
    """Latent attention: size of the normalised vector that queries are projected from (DeepSeek-V3: 1536). null: they
    are projected from the hidden state (DeepSeek-V2-Lite)."""
    qk_nope_head_dim: int = setting(128, ge=1)
    """Latent attention: dimensions of a query and of a key without position."""
    qk_rope_head_dim: int = setting(64, ge=1)
    """Latent attention: further dimensions of a query and of a key, which are rotated; an even number."""
    v_head_dim: int = setting(128, ge=1)
    """Latent attention: dimensions of a value, at most qk_nope_head_dim + qk_rope_head_dim. Kernels compute values
    padded with zeros to that width."""
    ffn_hidden_size: int = setting(512, ge=1)
    """Hidden size of the dense feed-forward layers, and of the experts unless model.moe sets another."""
    qk_norm: str | None = setting(None, choices=(None, "head", "full", "l2"))
    """RMSNorm of queries and keys, with norm_eps: null, head, full or l2. Before the rotary embedding, head: over
    each head, with one weight shared by all query heads and one shared by all key heads (Qwen3, arXiv:2505.09388,
    section 2); full: over all query heads together and all key heads together (OLMoE, arXiv:2409.02060, section 2),
    which with parallel.tp needs a small all-reduce per layer in each direction. After it, l2: over each head, without
    weights, in the layers that have a rotary embedding (Llama 4). null: none."""
    attention_bias: bool = False
    """Add biases to the query, key and value projections, initialised to zero and without weight decay (Qwen2,
    arXiv:2407.10671, section 2.2.1). The output projection has one with attention_output_bias."""
    attention_output_bias: bool = False
    """Add a bias to the output projection of attention, initialised to zero and without weight decay (gpt-oss,
    arXiv:2508.10925)."""
    attention_output_gate: str | None = setting(None, choices=(None, "head", "elementwise"))
    """Multiply what a query attends to, before the output projection, by the sigmoid of a further projection of the
    query's token (arXiv:2505.06708, section 2.2): null, head or elementwise. head: a number for each query head.
    elementwise: one for each of its dimensions (Qwen3-Next). null: no gate."""
    attention_sinks: bool = False
    """Add a learned logit for each query head to the denominator of its softmax, initialised to zero and without weight
    decay, so that a head can attend to nothing (gpt-oss, arXiv:2508.10925, section 2.3; related to arXiv:2309.17453,
    section 3.3)."""
    sliding_window: int | None = setting(None, ge=1)
    """Number of tokens that a token attends to at most, itself included, in the layers with local attention (Mistral
    7B, arXiv:2310.06825, section 2: 4096; gpt-oss: 128). null: no window."""
    attention_chunk_size: int | None = setting(None, ge=1)
    """Size of the chunks of a document, counted from its start, within which tokens attend in the layers with local
    attention (Llama 4: 8192). null: no chunks."""
    full_attention_every: int | None = setting(None, ge=2)
    """Interval of the layers without sliding_window or attention_chunk_size. 2: every second layer (1, 3, 5, ...,
    counted from 0; gpt-oss), and so on (Llama 4: 4). null: every layer after first_full_attention_layers has local
    attention."""
    first_full_attention_layers: int = setting(0, ge=0)
    """Number of layers at the beginning of the model without sliding_window or attention_chunk_size (Qwen2,
    arXiv:2407.10671: max_window_layers)."""
    ffn_bias: bool = False
    """Add biases to the linear layers of dense feed-forward layers and shared experts, initialised to zero and without
    weight decay (Ernie 4.5). Routed experts have them with model.moe.expert_bias."""
    clip_qkv: float | None = setting(None, gt=0)
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv], after qk_norm and before the rotary embedding (MPT;
    DBRX: 8; OLMo, arXiv:2402.00838). null: no clamping."""
    activation: str = setting("geglu", choices=ACTIVATIONS)
    """Activation of feed-forward layers and experts: swiglu, geglu, clamped_swiglu (all three gated, with two input
    projections), gelu, relu or relu2 (squared ReLU; Primer, arXiv:2109.08668). clamped_swiglu: (up + 1) * gate *
    sigmoid(swiglu_alpha * gate), with the gate clamped from above and up on both sides to swiglu_limit (gpt-oss,
    arXiv:2508.10925); not in FP8 on GPUs."""
    swiglu_alpha: float = setting(1.702, gt=0)
    """Factor within the sigmoid of clamped_swiglu."""
    swiglu_limit: float = setting(7.0, gt=0)
    """Bound of the inputs of clamped_swiglu."""
    vocab_size: int = setting(4096, ge=1)
    """Number of rows of the embedding; also the vocabulary size of a tokenizer that is trained on the data."""
    tie_embeddings: bool = False
    """Share the weights of the embedding and the output layer."""
    head_bias: bool = False
    """Add a bias to the output layer, initialised to zero and without weight decay (Phi-3.5-MoE, arXiv:2404.14219). It
    is not multiplied by logit_multiplier."""
    rope_theta: float = setting(10000.0, gt=0)
    """Base of the rotary embedding's frequencies (RoFormer, arXiv:2104.09864)."""
    partial_rotary_factor: float = setting(1.0, gt=0, le=1)
    """Fraction of each head's dimensions, from the first one on, that is rotated (GPT-NeoX, arXiv:2204.06745; GLM-4.5,
    arXiv:2508.06471: 0.5). The others carry no position."""
    rope_interleave: bool = False
    """Rotate pairs of adjacent dimensions (RoFormer, arXiv:2104.09864, eq. 34; DeepSeek) instead of pairing each
    dimension of the first half with one of the second half (GPT-NeoX, Llama in Transformers)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    no_rope_every: int | None = setting(None, ge=2)
    """Interval of the layers without rotary embedding (NoPE, arXiv:2305.19466). 4: layers 3, 7, 11, ..., counted from 0
    (Llama 4, SmolLM3). null: every layer has one."""
    attention_temperature: float | None = setting(None, gt=0)
    """Factor c of the attention temperature of long documents, in the layers without rotary embedding: the query at
    position i, counted from 0, is multiplied by 1 + c * ln(1 + floor((i + 1) / attention_temperature_tokens)) (Llama 4:
    0.1; after arXiv:2501.19399, section 2). null: none."""
    attention_temperature_tokens: int = setting(8192, ge=1)
    """Number of tokens after which attention_temperature has its next value."""
    embedding_multiplier: float = setting(1.0, gt=0)
    """Factor of the embedding's output (Granite 3.0; muP, arXiv:2203.03466)."""
    attention_multiplier: float | None = setting(None, gt=0)
    """Factor of the products of queries and keys (Granite 3.0; muP). null: head_dim ** -0.5."""
    residual_multiplier: float = setting(1.0, gt=0)
    """Factor of the output of every attention and feed-forward layer before it is added to the residual stream (Granite
    3.0; muP)."""
    logit_multiplier: float = setting(1.0, gt=0)
    """Factor of the logits (Granite 3.0, whose logits_scaling is its inverse; muP)."""
    logit_softcap: float | None = setting(None, gt=0)
    """Bound c of the logits z, which become c * tanh(z / c) (Gemma 2, arXiv:2408.00118, section 2: 30). null: none."""
    norm: str = setting("rmsnorm", choices=("rmsnorm", "layernorm"))
    """Norm before attention, feed-forward layers and the output layer: rmsnorm or layernorm. layernorm: also subtracts
    the mean and has a bias, initialised to zero (arXiv:1607.06450; Phi-3.5-MoE), computed by PyTorch. qk_norm is
    RMSNorm either way."""
    norm_zero_centered: bool = False
    """Multiply normalised values by 1 + weight instead of weight, in all norms but those of latent attention, with
    weights initialised to zero (Gemma; layernorm_zero_centered_gamma of Megatron-Core)."""
    norm_eps: float = setting(1e-6, gt=0)
    """Term added to the mean square in RMSNorm and to the variance in LayerNorm."""
    init_scale: float = setting(0.1, gt=0, resumable=True)
    """Scale s of the initial weights, drawn from a normal distribution with standard deviation sqrt(s / fan_in),
    truncated at two standard deviations. Switch, section 2.4, reduces the usual 1.0 tenfold for stability."""
    recompute: list[str] = field(default_factory=list, metadata={"resumable": lambda old, new: True})
    """Activations that are recomputed in the backward pass instead of being saved: norm (outputs of the norms),
    activation (between the two linear layers of feed-forward layers and experts), moe (the whole sparse layer), full
    (the whole transformer layer; excludes the others). Routing decisions are always saved, never recomputed."""
    moe: MoeConfig = field(default_factory=MoeConfig)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is sparse."""
        moe = self.moe
        return moe.num_experts > 0 and layer >= moe.first_dense_layers and layer % moe.every == moe.every - 1

    @property
    def sparse_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_sparse(layer)]

    @property
    def local_layers(self) -> list[int]:
        """The layers with sliding_window or attention_chunk_size, counted from 0."""
        if self.sliding_window is None and self.attention_chunk_size is None:
            return []
        every, first = self.full_attention_every, self.first_full_attention_layers
        return [i for i in range(first, self.num_layers) if every is None or i % every != every - 1]

    def has_rope(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a rotary embedding."""
        return self.no_rope_every is None or layer % self.no_rope_every != self.no_rope_every - 1

    @property
    def activation_name(self) -> str:
        """The activation and the settings that it has (ops.activations)."""
        if self.activation != "clamped_swiglu":
            return self.activation
        return f"{self.activation}:{self.swiglu_alpha}:{self.swiglu_limit}"

    @property
    def head_width(self) -> int:
        """Number of dimensions of a query and of a key."""
        if self.kv_lora_rank is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Number of dimensions of a query and of a key that are rotated."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def expert_width(self) -> int:
        """moe.ffn_hidden_size, or its default."""
        return self.moe.ffn_hidden_size or self.ffn_hidden_size

    @property
    def shared_width(self) -> int:
        """Hidden size of all shared experts together."""
        return self.moe.num_shared_experts * (self.moe.shared_ffn_hidden_size or self.expert_width)

    @property
    def query_groups(self) -> int:
        """num_query_groups, or its default."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Size of all query heads together."""
        return self.num_attention_heads * self.head_width

    @property
    def gate_width(self) -> int:
        """Number of attention's gates (attention_output_gate) of a token."""
        return {None: 0, "head": self.num_attention_heads}.get(self.attention_output_gate, self.query_width)

    @property
    def qkv_width(self) -> int:
        """Size of queries, gates, keys and values of all heads together, in grouped-query attention."""
        return self.query_width + self.gate_width + 2 * self.key_width

    @property
    def key_width(self) -> int:
        """Size of all key heads together, which in grouped-query attention is that of all value heads."""
        return self.query_groups * self.head_width

    @property
    def output_width(self) -> int:
        """Size of the values of all query heads together, from which the output is projected."""
        return self.query_width if self.kv_lora_rank is None else self.num_attention_heads * self.v_head_dim
