"""What file systems have answered about objects: a run whose data are all in the cache starts without a network.

Only questions about objects are answered from memory: which there are, and their versions. Content is always requested.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from corpus.cache import Cache

Answer = TypeVar("Answer")


class Answers:
    """Asks file systems, and remembers what they answer."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._unchecked: set[str] = set()
        self._why = ""

    def ask(self, what: str, url: str, request: Callable[[], Answer]) -> Answer:
        """The answer, or that of an earlier run if there is no connection.

        Args:
            request: its answer is JSON-serialisable.

        Raises:
            OSError: there is no connection and no earlier answer, or the object does not exist or may not be read.
        """
        name = f"{what} of {url}"
        before = self._cache.recall(name)
        if not self._why or before is None:
            try:
                answer = request()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if before is None:
                    raise
                self._why = error.strerror or str(error)
            else:
                self._cache.remember(name, json.loads(json.dumps([answer])))
                return answer
        self._unchecked.add(url)
        return before[0]

    def notes(self) -> list[str]:
        """The message for the user, if answers of an earlier run were used."""
        if not self._unchecked:
            return []
        first, *others = sorted(self._unchecked)
        more = f" and {len(others)} more" if others else ""
        return [
            f"no answer about {first}{more} ({self._why}): what is in data.cache_dir is used, and whether the objects "
            "have changed is not checked"
        ]


_ANSWERS: ContextVar[Answers | None] = ContextVar("answers", default=None)


@contextmanager
def remembering(cache: Cache) -> Iterator[Answers]:
    """Context manager in which `answer` remembers in the cache."""
    answers = Answers(cache)
    before = _ANSWERS.set(answers)
    try:
        yield answers
    finally:
        _ANSWERS.reset(before)


def answer(what: str, url: str, request: Callable[[], Answer]) -> Answer:
    """As `Answers.ask`; outside of `remembering` what `request` returns."""
    answers = _ANSWERS.get()
    return request() if answers is None else answers.ask(what, url, request)
