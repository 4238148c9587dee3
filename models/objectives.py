"""The objectives of training on preferences (train.objective), by name.

The sequences of a micro-batch are grouped by prompt: K in a row for each, the best response first.

Legend: B sequences, S sequence (this rank's shard), P prompts, K responses, M metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from conf.preference_schema import PREFERENCE_METRICS, REWARD_METRICS
from conf.registry import Registry
from conf.schema import PreferenceConfig
from models.preference_losses import mean_over_pairs, pair_losses, ranking_losses
from parallel.objective import Batch, Objective, shard_over, sum_over_ranks

REFERENCE = "reference_logps"
"""Key of a micro-batch: log-probabilities of the responses under the reference [B]."""


def response_logps(losses_BS: Tensor, batch: Batch, cp: dist.ProcessGroup) -> Tensor:
    """Log-probability [B] of each response: of the labels that loss_mask counts, summed in fp64. The same on every rank
    of cp.

    Args:
        losses_BS: the cross-entropy of every label.
    """
    mask_BS = shard_over(batch["loss_mask"], cp)
    return sum_over_ranks(-losses_BS.double().where(mask_BS > 0, 0).sum(1), cp)


class DirectPreferences:
    """DPO, IPO and length-normalised DPO (models.preference_losses.pair_losses) of pairs. What it calls the reward of a
    response is beta times its log-ratio (Rafailov et al. 2023, arXiv:2305.18290, section 5)."""

    metrics: tuple[str, ...] = PREFERENCE_METRICS

    def __init__(self, settings: PreferenceConfig):
        self.settings = settings

    def terms(self, output_BS: Tensor, batch: Batch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        logps_P2 = response_logps(output_BS, batch, cp).view(-1, 2)
        lengths_P2 = batch["loss_mask"].sum(1).view(-1, 2)
        ratios_P2 = logps_P2 - batch[REFERENCE].view(-1, 2)
        losses_P = pair_losses(
            ratios_P2,
            lengths_P2,
            loss=settings.loss,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        chosen_P, rejected_P = (settings.beta * ratios_P2).unbind(1)
        right_P = (chosen_P > rejected_P).to(chosen_P.dtype)
        metrics = (chosen_P, rejected_P, chosen_P - rejected_P, right_P, *logps_P2.unbind(1))
        return losses_P, torch.stack(metrics, 1), (lengths_P2 > 0).all(1)


def sequence_rewards(rewards_BS: Tensor, batch: Batch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(reward of each sequence [B]: that of its last token; whether it has any token [B]). The same on every rank of
    cp.

    Args:
        rewards_BS: the output of a reward model for every token.
    """
    length_B = (~batch["padding"]).sum(1)
    last_BS = torch.arange(batch["padding"].shape[1], device=length_B.device) == length_B[:, None] - 1
    rewards_B = rewards_BS.double().where(shard_over(last_BS, cp), 0).sum(1)
    return sum_over_ranks(rewards_B, cp), length_B > 0


class RewardModeling:
    """The ranking loss of a reward model (models.preference_losses.ranking_losses)."""

    metrics: tuple[str, ...] = REWARD_METRICS

    def __init__(self, settings: PreferenceConfig):
        self.settings = settings

    def terms(self, output_BS: Tensor, batch: Batch, cp: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        rewards_B, exists_B = sequence_rewards(output_BS, batch, cp)
        responses = self.settings.max_responses
        rewards_PK, exists_PK = rewards_B.view(-1, responses), exists_B.view(-1, responses)
        losses_P = ranking_losses(rewards_PK, exists_PK, centering=self.settings.center_rewards_coefficient)
        first_PKK, second_PKK = torch.broadcast_tensors(rewards_PK[:, :, None], rewards_PK[:, None, :])
        of_pairs = (first_PKK, second_PKK, first_PKK - second_PKK, (first_PKK > second_PKK).to(first_PKK.dtype))
        metrics_PM = torch.stack([mean_over_pairs(values_PKK, exists_PK) for values_PKK in of_pairs], 1)
        return losses_P, metrics_PM, exists_PK[:, :2].all(1)


@dataclass(frozen=True)
class ObjectiveKind:
    """A value of train.objective, on the sequences of data=preference."""

    name: str
    make: Callable[[PreferenceConfig], Objective]
    reference: bool = False
    """Whether its micro-batches have the log-probabilities of the reference (REFERENCE)."""


def _check_metrics(kind: ObjectiveKind) -> None:
    if unknown := [name for name in kind.make(PreferenceConfig()).metrics if name not in PREFERENCE_METRICS]:
        raise ValueError(
            f"objective {kind.name}: metrics.jsonl has no {', '.join(unknown)}; its metrics are some of "
            f"{', '.join(PREFERENCE_METRICS)}"
        )


OBJECTIVES: Registry[ObjectiveKind] = Registry(
    "objective",
    ObjectiveKind("dpo", DirectPreferences, reference=True),
    ObjectiveKind("reward", RewardModeling),
    check=_check_metrics,
)
"""Values of train.objective. language_modeling is the engine's own."""


def needs_reference(name: str) -> bool:
    """Whether an objective compares with a reference."""
    return name in OBJECTIVES and OBJECTIVES[name].reference


def objective_of(name: str, settings: PreferenceConfig) -> Objective | None:
    """None: language modelling."""
    return OBJECTIVES[name].make(settings) if name in OBJECTIVES else None
