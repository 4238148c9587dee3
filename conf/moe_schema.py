"""The settings of the sparse layers: routing, balancing, dispatch and experts."""

from dataclasses import dataclass

from conf.setting import setting

DROP_POLICIES = ("position", "probability", "random")
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "expert_choice")


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
    overlap_degree: int = setting(1, ge=1, resumable=True)
    """Number of parts in which the rows of a layer travel to their experts (parallel.ep > 1) and back, each for as many
    experts of every rank: the experts of a part compute while the next part arrives and the one before travels back,
    forward and backward (Tutel, arXiv:2206.03382, calls it the pipeline degree, and cuts tokens instead). Capacity,
    drops and results are the same, and so are each expert's products, but for fp8.recipe=tensorwise, which scales the
    rows of a part together. Uses dispatcher=all_to_all. 1: all rows travel at once; the shared experts compute
    meanwhile."""
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
    router_init_scale: float | None = setting(None, gt=0, resumable=True)
    """Scale of the router's initial weights in place of model.init_scale (null). The larger they are, the less the
    first steps move the assignments."""
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
