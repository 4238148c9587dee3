"""Keeps documents in given languages, recognised by py3langid, whose model is part of its package, or by a fastText
model on disk."""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from corpus.documents import nearest_existing

_CHARACTERS = 10_000
"""Of a document, from its beginning, that are looked at."""


@cache
def _load(model: str | None) -> Any:
    if model is not None:
        import fasttext

        return fasttext.load_model(model)
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Language(BaseFilter):
    """Drops documents that are not in one of the languages."""

    name = "language"

    def __init__(self, keep: Sequence[str] = ("en",), threshold: float = 0.65, model: str | None = None) -> None:
        """
        Args:
            keep: codes of languages, as the model has them: en, de, zh.
            threshold: the least probability of the language.
            model: file of a fastText language identification model, such as lid.176.bin. None: py3langid.
        """
        super().__init__()
        if isinstance(keep, str) or not keep:
            raise ValueError("prepare.steps: language: keep is a list of languages: keep=[en]")
        if not 0 <= threshold <= 1:
            raise ValueError(f"prepare.steps: language: threshold={threshold} must lie between 0 and 1")
        package = "py3langid" if model is None else "fasttext"
        if importlib.util.find_spec(package) is None:
            how = "bash launch/setup.sh data" if model is None else "pip install fasttext-numpy2-wheel"
            raise ValueError(f"prepare.steps: language needs {package}: {how}")
        if model is not None and not os.path.isfile(model):
            raise ValueError(f"prepare.steps: language: model={model} does not exist{nearest_existing(model)}")
        self.keep, self.threshold, self.model = tuple(keep), threshold, model
        unknown = [code for code in keep if code not in self._codes]
        if unknown:
            raise ValueError(f"prepare.steps: language: {unknown[0]} is none of {', '.join(sorted(self._codes))}")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, probability = self._predict(doc.text[:_CHARACTERS])
        if language not in self.keep:
            return False, language
        return True if probability >= self.threshold else (False, "uncertain")

    @cached_property
    def _codes(self) -> set[str]:
        if self.model is None:
            return {str(code) for code in self._identifier.labels}
        return {label.removeprefix("__label__") for label in self._identifier.get_labels()}

    @property
    def _identifier(self) -> Any:
        return _load(self.model)

    def _predict(self, text: str) -> tuple[str, float]:
        """The likeliest language and its probability."""
        if self.model is None:
            language, probability = self._identifier.classify(text)
            return str(language), float(probability)
        labels, probabilities = self._identifier.predict(text.replace("\n", " "))
        return labels[0].removeprefix("__label__"), float(probabilities[0])
