"""Models whose experts choose their tokens among later ones too: what that means for their figures and their text."""

from conf.schema import ModelConfig


def warning(model: ModelConfig) -> str | None:
    """What a person should know of the figures of such a model; None for any other."""
    if not _looks_ahead(model):
        return None
    return (
        "model.moe.load_balancing=expert_choice looks ahead: which tokens an expert takes hangs on later ones, in "
        "evaluation too. Held-out losses come out lower than what the model can predict, and it cannot write text"
    )


def check_can_generate(model: ModelConfig) -> None:
    """Raises ValueError where no text can be generated."""
    if _looks_ahead(model):
        raise ValueError(
            "the model was trained with model.moe.load_balancing=expert_choice: its experts choose among all tokens of "
            "a micro-batch, and a text being written has no later ones yet. It can be evaluated, not generate"
        )


def _looks_ahead(model: ModelConfig) -> bool:
    return model.moe.num_experts > 0 and model.moe.load_balancing == "expert_choice"
