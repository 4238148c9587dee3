"""The settings of low-rank adapters."""

from dataclasses import dataclass, field

from conf.setting import setting


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): the weights of checkpoint.load are frozen, and to
    each adapted layer scale * B A x is added, of which only A and B are trained and kept in checkpoints
    (docs/guides/adapters.md)."""

    rank: int | None = setting(None, ge=1)
    """Rank of the adapters, r. null: no adapters; all weights are trained."""
    alpha: float = setting(16.0, gt=0)
    """The scale is alpha / rank (section 4.1)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the size of the update the same at high ranks (rank-stabilized
    LoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5): each row of W + scale * B A is
    scaled to a length of its own, which is trained, too, and begins as that of W's row. Of attention, dense and shared
    layers; routed experts have none."""
    dropout: float = setting(0.0, ge=0, lt=1)
    """Probability with which each input of an adapter is dropped while training."""
    target: list[str] = field(default_factory=lambda: ["*"])
    """The layers that have adapters: patterns of their names, of which the last that matches decides and '!PATTERN'
    exempts. The names: of attention layers.N.attention.q, k, v, gate and out; of latent attention .q, or .q_down and
    .q_up, .kv_down, .kv_up and .out; of dense feed-forward layers layers.N.ffn.gate, .up and .down; of shared experts
    layers.N.ffn.shared.ffn.gate, .up and .down; of routed experts, each of which has adapters of its own,
    layers.N.ffn.experts.gate, .up and .down. ['*'] is all of them, ['*.attention.*'] those of attention."""
