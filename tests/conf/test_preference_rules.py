"""Rules for training on preferences."""

import pytest

from conf import rules
from conf.schema import Config, DataConfig, EvalConfig, ModelConfig, PreferenceConfig, TrainConfig


def config(objective="dpo", kind="preference", head=False, *, sample=0, train=None, preference=None, **model):
    files = ["x.jsonl"] if kind == "preference" else []
    return Config(
        model=ModelConfig(reward_head=head, **model),
        data=DataConfig(kind=kind, files=files),
        train=TrainConfig(objective=objective, **(train or {})),
        eval=EvalConfig(sample_tokens=sample),
        preference=PreferenceConfig(**(preference or {})),
    )


@pytest.mark.parametrize(
    "given",
    [
        config(),
        config(sample=96),
        config(preference={"loss": "ipo", "beta": 0.5}),
        config(preference={"label_smoothing": 0.1}),
        config("reward", head=True),
        config("reward", head=True, preference={"max_responses": 4, "center_rewards_coefficient": 0.01}),
    ],
)
def test_what_works(given):
    rules.check(given, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(kind="stdlib"), "train.objective=dpo needs data=preference"),
        (config("language_modeling"), "data=preference needs train.objective=dpo or reward, but it is language_mod"),
        (config("reward"), "nearest: model.reward_head=true or train.objective=dpo"),
        (config(head=True), "nearest: train.objective=reward or model.reward_head=false"),
        (config("language_modeling", "stdlib", head=True), "train.objective=reward goes with model.reward_head=true"),
        (config("reward", head=True, sample=9), "needs eval.sample_tokens=0, but it is 9"),
        (config(mtp_num_layers=1), "needs model.mtp_num_layers=0"),
        (config(train={"micro_batch_size": 1}), "train.micro_batch_size % 2 == 0"),
        (
            config("reward", head=True, preference={"max_responses": 3}),
            "4 % 3 = 1; nearest: preference.max_responses=2",
        ),
        (config(preference={"max_responses": 4}), "preference.max_responses needs train.objective=reward"),
        (config("reward", head=True, preference={"beta": 0.5}), "preference.beta needs train.objective=dpo"),
        (config(preference={"loss": "ipo", "label_smoothing": 0.1}), "needs preference.loss other than ipo"),
        (config(preference={"label_smoothing": 0.5}), "preference.label_smoothing >= 0 and < 0.5"),
        (config(preference={"loss": "hinge"}), "preference.loss is one of sigmoid, ipo, sigmoid_norm"),
    ],
)
def test_what_does_not(given, message):
    with pytest.raises(ValueError) as raised:
        rules.check(given, 1)
    assert message in str(raised.value)
