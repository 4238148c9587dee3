"""Reward models as Transformers' models for sequence classification with one label."""

import importlib.util
from dataclasses import replace

from models.hf.family import Family

SUFFIX = "ForSequenceClassification"
ONE_LABEL = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
"""Of config.json."""


def sequence_classification(family: Family) -> Family:
    """The family with its model for sequence classification.

    Raises:
        ValueError: Transformers has none.
    """
    architecture = family.architecture.removesuffix("ForCausalLM") + SUFFIX
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        if not hasattr(transformers, architecture):
            raise ValueError(
                f"a reward model is exported as {architecture}, which Transformers {transformers.__version__} does not "
                "have; its scores: python -m launch.score"
            )
    weights = [replace(r, tensors=("score.weight",)) if r.parameter == "head.weight" else r for r in family.weights]
    return replace(family, architecture=architecture, weights=tuple(weights))
