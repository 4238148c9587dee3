"""The typed settings of a model, with their units and defaults, and which of them may change once weights are trained.

Nothing heavy is imported here, as in conf/schema.py.
"""

from dataclasses import dataclass, field

from conf.moe_schema import MoeConfig
from conf.rope_schema import RopeScalingConfig
from conf.setting import setting

GATED_ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu")
RECOMPUTE = ("norm", "activation", "moe", "full")


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
    reward_head: bool = False
    """Replace the output layer by a linear layer to one number, the reward: a reward model (Ouyang et al. 2022,
    arXiv:2203.02155), trained with train.objective=reward. Its initial weights have a standard deviation of 1 /
    sqrt(hidden_size + 1) (Stiennon et al. 2020, arXiv:2009.01325). tie_embeddings and head_bias then have no effect."""
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
    transformer_impl: str = setting("auto", choices=("auto", "local", "transformer_engine"), resumable=True)
    """Implementation of linear layers, norms and attention in training, as Megatron-Core's setting of this name: local,
    transformer_engine or auto. local: nothing of TransformerEngine, its optimizer included. auto: of TransformerEngine
    what is installed and reproduces the reference at the start of the run (bf16 on GPUs). transformer_engine: linear
    layers, norms before them and attention have to be TransformerEngine's, or the run ends with exit code 2."""
    mtp_num_layers: int = setting(0, ge=0)
    """Number D of layers for multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2; GLM-4.5: 1). Layer k
    predicts the token k + 1 ahead, from the output of layer k - 1 (for the first: of the final norm) and the embedding
    of the token k ahead, with a transformer block like the last one of the model. Embedding and output layer are those
    of the model. Used in training only, and in bf16 with precision=fp8. 0: none."""
    mtp_loss_scaling_factor: float = setting(0.1, gt=0, resumable=True)
    """Weight of the loss of multi-token prediction, the mean over its layers, in what is minimised (arXiv:2412.19437,
    eq. 25; DeepSeek-V3: 0.3 for the first 10T tokens, then 0.1). The logged loss is that of the next token alone."""
    moe: MoeConfig = field(default_factory=MoeConfig)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is sparse. Those for multi-token prediction are like the last one."""
        moe, layer = self.moe, min(layer, self.num_layers - 1)
        return moe.num_experts > 0 and layer >= moe.first_dense_layers and layer % moe.every == moe.every - 1

    def is_local(self, layer: int) -> bool:
        """Whether a layer has local attention. Those for multi-token prediction are like the last one."""
        return min(layer, self.num_layers - 1) in self.local_layers

    @property
    def ties_head(self) -> bool:
        """Whether the output layer shares the embedding's weights."""
        return self.tie_embeddings and not self.reward_head

    @property
    def stages_share_embedding(self) -> bool:
        """Whether the last pipeline stage, too, needs the embedding: as output layer, for multi-token prediction, or
        for both."""
        return self.ties_head or self.mtp_num_layers > 0

    @property
    def output_size(self) -> int:
        """Outputs of the output layer for a token."""
        return 1 if self.reward_head else self.vocab_size

    @property
    def mtp_layers(self) -> range:
        """The layers for multi-token prediction, which are counted after the others."""
        return range(self.num_layers, self.num_layers + self.mtp_num_layers)

    @property
    def sparse_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_sparse(layer)]

    @property
    def routed_layers(self) -> list[int]:
        """All layers with a router: the sparse layers, and those for multi-token prediction if they are sparse."""
        return [*self.sparse_layers, *filter(self.is_sparse, self.mtp_layers)]

    @property
    def local_layers(self) -> list[int]:
        """The layers with sliding_window or attention_chunk_size, counted from 0."""
        if self.sliding_window is None and self.attention_chunk_size is None:
            return []
        every, first = self.full_attention_every, self.first_full_attention_layers
        return [i for i in range(first, self.num_layers) if every is None or i % every != every - 1]

    def has_rope(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a rotary embedding."""
        layer = min(layer, self.num_layers - 1)  # those for multi-token prediction are like the last one
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
    def router_std(self) -> float:
        """Standard deviation of the router's initial weights."""
        scale = self.init_scale if self.moe.router_init_scale is None else self.moe.router_init_scale
        return (scale / self.hidden_size) ** 0.5

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
