"""The settings of training on preferences: direct preference optimization and reward models."""

from dataclasses import dataclass

from conf.setting import setting

OBJECTIVES = ("language_modeling", "dpo", "reward")
PREFERENCE_LOSSES = ("sigmoid", "ipo", "sigmoid_norm")
REWARD_METRICS = ("rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy")
PREFERENCE_METRICS = (*REWARD_METRICS, "logps_chosen", "logps_rejected")
"""What metrics.jsonl has of an objective beside its loss."""


@dataclass
class PreferenceConfig:
    """train.objective=dpo and train.objective=reward. Names follow TRL."""

    loss: str = setting("sigmoid", choices=PREFERENCE_LOSSES)
    """Loss of a pair: sigmoid, ipo or sigmoid_norm. sigmoid: DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). ipo:
    the squared distance of the difference of log-ratios per token to 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036,
    eq. 17; per token as in TRL). sigmoid_norm: as sigmoid, with log-ratios per token."""
    beta: float = setting(0.1, gt=0)
    """Strength of the constraint to stay near the reference: beta of DPO, tau of IPO. With sigmoid_norm, whose
    log-ratios are per token, larger values are usual: 2 to 10."""
    label_smoothing: float = setting(0.0, ge=0, lt=0.5)
    """Probability that a label of the data is flipped (conservative DPO: arXiv:2305.18290, eq. 7, of both orders, in
    these proportions)."""
    max_responses: int = setting(2, ge=2)
    """Number of sequences that a prompt takes in a micro-batch of a reward model: the largest number of ranked
    responses. A prompt with fewer is padded. Divides train.micro_batch_size."""
    center_rewards_coefficient: float = setting(0.0, ge=0)
    """Coefficient of the mean squared sum of two responses' rewards, which keeps rewards near zero (Eisenstein et al.
    2023, arXiv:2312.09244, eq. 2)."""


def sequences_per_prompt(objective: str, settings: PreferenceConfig) -> int:
    """Sequences that a prompt takes in a micro-batch, the most responses that it can have."""
    return settings.max_responses if objective == "reward" else 2
