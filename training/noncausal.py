"""Restrictions of models with expert-choice routing, which is not causal; and of reward models."""

from conf.schema import ModelConfig


def warning(model: ModelConfig) -> str | None:
    """A warning about the metrics of such a model; None for other models."""
    if not _looks_ahead(model):
        return None
    return (
        "model.moe.load_balancing=expert_choice is not causal: which tokens an expert selects depends on later tokens, "
        "also in evaluation. Held-out losses are lower than in causal prediction, and the model cannot generate text"
    )


def check_can_generate(model: ModelConfig) -> None:
    """Raises ValueError if the model cannot generate text."""
    check_predicts_tokens(model)
    if _looks_ahead(model):
        raise ValueError(
            "the model was trained with model.moe.load_balancing=expert_choice: its experts select among all tokens of "
            "a micro-batch, and in generation there are no later tokens. It can be evaluated but cannot generate text"
        )


def can_generate(model: ModelConfig) -> bool:
    """Whether `check_can_generate` accepts it."""
    return not model.reward_head and not _looks_ahead(model)


def check_predicts_tokens(model: ModelConfig) -> None:
    """Raises ValueError for a reward model."""
    if model.reward_head:
        raise ValueError("it is a reward model, which predicts no tokens; python -m launch.score gives its rewards")


def _looks_ahead(model: ModelConfig) -> bool:
    return model.moe.num_experts > 0 and model.moe.load_balancing == "expert_choice"
