"""The typed settings of the scaling of rotary embeddings.

Nothing heavy is imported here, as in conf/schema.py.
"""

from dataclasses import dataclass, field

from conf.setting import setting

ROPE_SCALING = (None, "linear", "llama3", "yarn", "longrope")


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary embedding's frequencies to sequences longer than those of pre-training. Names and formulas
    are those of Transformers (modeling_rope_utils.py)."""

    type: str | None = setting(None, choices=ROPE_SCALING)
    """Kind of scaling: null, linear, llama3, yarn or longrope. linear: all frequencies are divided by factor (position
    interpolation, arXiv:2306.15595). llama3: low frequencies are divided by factor, high ones are kept, those between
    are interpolated (Llama 3.1, arXiv:2407.21783). yarn: as llama3, interpolated by the number of rotations within
    original_max_position_embeddings, and with scaled attention (arXiv:2309.00071, section 3). longrope: every
    frequency is divided by a factor of its own (arXiv:2402.13753). null: none."""
    factor: float = setting(1.0, ge=1)
    """Ratio of the longest sequence to that of pre-training."""
    original_max_position_embeddings: int | None = setting(None, ge=1)
    """Length of sequences in pre-training. Needed by llama3, yarn and longrope."""
    low_freq_factor: float = setting(1.0, gt=0)
    """llama3: frequencies with fewer rotations than this within original_max_position_embeddings are divided by
    factor."""
    high_freq_factor: float = setting(4.0, gt=0)
    """llama3: frequencies with more rotations than this are kept."""
    beta_fast: float = setting(32.0, gt=0)
    """yarn: frequencies with more rotations than this within original_max_position_embeddings are kept
    (arXiv:2309.00071, eq. 17: beta)."""
    beta_slow: float = setting(1.0, gt=0)
    """yarn: frequencies with fewer rotations than this are divided by factor (arXiv:2309.00071, eq. 17: alpha)."""
    truncate: bool = True
    """yarn: round the first and the last interpolated dimension outwards to integers (false: gpt-oss)."""
    attention_factor: float | None = setting(None, gt=0)
    """yarn: factor of the rotated queries and keys. null: m(mscale) / m(mscale_all_dim) with m(x) = 0.1 x ln(factor) +
    1, or m(1) if these are null (arXiv:2309.00071, eq. 22)."""
    mscale: float | None = setting(None, ge=0)
    """yarn: see attention_factor (DeepSeek-V3: 1). Needs mscale_all_dim."""
    mscale_all_dim: float | None = setting(None, ge=0)
    """yarn: see attention_factor (DeepSeek-V3: 1)."""
    short_factor: list[float] = field(default_factory=list)
    """longrope: the divisor of each frequency, half as many as rotated dimensions, while a whole sequence (not one of
    its documents) is no longer than original_max_position_embeddings."""
    long_factor: list[float] = field(default_factory=list)
    """longrope: the divisors in longer sequences."""
    short_mscale: float = setting(1.0, gt=0)
    """longrope: factor of the rotated queries and keys, where short_factor divides (Phi-3.5-MoE: 1.243)."""
    long_mscale: float = setting(1.0, gt=0)
    """longrope: the same, where long_factor divides."""
