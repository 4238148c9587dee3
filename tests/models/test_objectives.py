"""DPO and reward models against naive implementations with Transformers' models in float64: each sequence by itself,
without padding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from conf.schema import ModelConfig, PreferenceConfig
from models.objectives import objective_of
from parallel.batch_context import BatchContext
from parallel.objective import evaluation_sums, training_loss
from tests.models.test_transformers_models import FAMILIES, as_transformers, their_model, trained_weights
from tests.moe.helpers import assert_close, whole_model

S = 12
LENGTHS, PROMPTS = [12, 7, 5, 9, 12, 6], [3, 3, 2, 2, 4, 4]
REFERENCE = torch.tensor([-20.0, -9.0, -8.0, -21.0, -23.0, -5.0], dtype=torch.float64)


def batch(model: ModelConfig) -> dict[str, Tensor]:
    """Three pairs of sequences of different lengths."""
    tokens = torch.randint(0, model.vocab_size, (len(LENGTHS), S), generator=torch.Generator().manual_seed(3))
    at, length, prompt = torch.arange(S), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "positions": at.expand(len(LENGTHS), -1),
        "loss_mask": ((at >= prompt - 1) & (at < length - 1)).float(),
        "padding": at >= length,
        "reference_logps": REFERENCE,
    }


def naive_dpo(theirs, tokens: Tensor, settings: PreferenceConfig) -> tuple[Tensor, dict[str, float]]:
    ratios, logps = [], []
    for row, length, prompt, reference in zip(tokens, LENGTHS, PROMPTS, REFERENCE, strict=True):
        logits = theirs(input_ids=row[None, :length]).logits[0]
        mine = sum(logits[i].log_softmax(0)[row[i + 1]] for i in range(prompt - 1, length - 1))
        logps.append(mine)
        per_token = length - prompt if settings.loss != "sigmoid" else 1
        ratios.append((mine - reference) / per_token)
    losses, margins = [], []
    for i in range(0, len(tokens), 2):
        margin = ratios[i] - ratios[i + 1]
        if settings.loss == "ipo":
            losses.append((margin - 1 / (2 * settings.beta)) ** 2)
        else:
            kept, flipped = F.logsigmoid(settings.beta * margin), F.logsigmoid(-settings.beta * margin)
            losses.append(-(1 - settings.label_smoothing) * kept - settings.label_smoothing * flipped)
        whole = settings.beta * (logps[i] - REFERENCE[i] - logps[i + 1] + REFERENCE[i + 1])
        margins.append(whole.item())
    return sum(losses) / len(losses), {
        "reward_margin": sum(margins) / len(margins),
        "reward_accuracy": sum(m > 0 for m in margins) / len(margins),
        "logps_chosen": sum(p.item() for p in logps[::2]) / len(margins),
        "logps_rejected": sum(p.item() for p in logps[1::2]) / len(margins),
    }


def naive_reward(theirs, tokens: Tensor, settings: PreferenceConfig) -> tuple[Tensor, dict[str, float]]:
    rewards = [theirs(input_ids=row[None, :length]).logits[0, 0] for row, length in zip(tokens, LENGTHS, strict=True)]
    losses, margins = [], []
    for first in range(0, len(rewards), settings.max_responses):
        mine, of_prompt = rewards[first : first + settings.max_responses], []
        for i, better in enumerate(mine):
            for worse in mine[i + 1 :]:
                centering = settings.center_rewards_coefficient * (better + worse) ** 2
                of_prompt.append((centering - F.logsigmoid(better - worse), (better - worse).item()))
        losses.append(sum(loss for loss, _ in of_prompt) / len(of_prompt))
        margins.append(sum(margin for _, margin in of_prompt) / len(of_prompt))
    return sum(losses) / len(losses), {"reward_margin": sum(margins) / len(margins)}


CASES = {
    "dpo": ("dpo", PreferenceConfig(beta=0.3)),
    "smoothed": ("dpo", PreferenceConfig(beta=0.3, label_smoothing=0.2)),
    "ipo": ("dpo", PreferenceConfig(loss="ipo", beta=0.4)),
    "per token": ("dpo", PreferenceConfig(loss="sigmoid_norm", beta=2.0, label_smoothing=0.1)),
    "reward": ("reward", PreferenceConfig(center_rewards_coefficient=0.01)),
    "ranking": ("reward", PreferenceConfig(max_responses=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_naive_implementation_with_transformers(case, runtime):
    objective, settings = CASES[case]
    family, model, theirs_settings = FAMILIES["qwen3_moe"]
    model = replace(model, reward_head=objective == "reward")
    stage = whole_model(model, runtime, sequence_length=S)
    trained_weights(stage)
    theirs = their_model(family, model, theirs_settings | {"experts_implementation": "eager"})
    if objective == "reward":
        theirs.config.num_labels = 1
        theirs = getattr(transformers, f"{family}ForSequenceClassification")(theirs.config)

    def renamed(named):
        found = as_transformers(dict(named), model)
        return {name.replace("lm_head", "score") if model.reward_head else name: t for name, t in found.items()}

    theirs.load_state_dict(renamed(stage.named_parameters()))
    theirs.double()

    made = {name: t.to(runtime.device) for name, t in batch(model).items()}
    context = BatchContext(padding_BS=made["padding"])
    output = stage(made["tokens"], made["positions"], made["labels"], context)
    ours, cp = objective_of(objective, settings), runtime.groups.cp
    loss, means = training_loss(ours, cp)(output, made)
    loss.backward()
    naive = naive_reward if objective == "reward" else naive_dpo
    wanted, metrics = naive(theirs, batch(model)["tokens"], settings)
    wanted.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and means[0] == loss
    got = dict(zip(ours.metrics, means[1:].tolist(), strict=True))
    assert {name: got[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    gradients = renamed((name, p.grad) for name, p in stage.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(gradients[name], parameter.grad, tolerance=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_padding_of_the_last_micro_batch_does_not_count(objective, runtime):
    model = replace(FAMILIES["qwen3_moe"][1], reward_head=objective == "reward")
    stage, cp = whole_model(model, runtime, sequence_length=S), runtime.groups.cp
    ours, made = objective_of(objective, PreferenceConfig()), batch(model)

    def sums(rows):
        part = {name: t.to(runtime.device) for name, t in rows.items()}
        output = stage(part["tokens"], part["positions"], part["labels"], BatchContext(padding_BS=part["padding"]))
        return evaluation_sums(ours, cp)(output, part)[1]

    empty = {"loss_mask": torch.zeros(2, S), "padding": torch.ones(2, S, dtype=torch.bool)}
    cut = {name: torch.cat([t[:4], empty.get(name, t[4:])]) for name, t in made.items()}
    both = [sums({name: t[:4] for name, t in made.items()}), sums(cut)]
    assert both[0][-1] == both[1][-1] == 2
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-5)
