"""Entries of an extension point by name: the built-in ones, and those that a user's module adds."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(dict[str, Entry], Generic[Entry]):
    """In the order in which they were added."""

    def __init__(self, kind: str, *entries: Entry, check: Callable[[Entry], None] = lambda entry: None):
        """Args:
        kind: what an entry is, for messages.
        check: raises ValueError where an entry that is added cannot work.
        """
        super().__init__({entry.name: entry for entry in entries})
        self.kind, self._check = kind, check

    def add(self, entry: Entry) -> Entry:
        """Makes an entry known by its name.

        Raises:
            ValueError: there is one of this name, or it cannot work.
        """
        if entry.name in self:
            raise ValueError(f"there is a {self.kind} {entry.name} already; give this one another name")
        self._check(entry)
        self[entry.name] = entry
        return entry
