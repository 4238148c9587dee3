"""Declares a setting and the values that it may have, in the metadata of its dataclass field (see conf/rules.py)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Change = Callable[[Any, Any], bool]
"""(old value, new value) of a setting -> whether trained weights keep their meaning."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, which must also be finite. None: no such bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __str__(self) -> str:
        bounds = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)

    def contain(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (-math.inf < value < math.inf)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def nearest(self, default: Any) -> Any:
        """The value to suggest for one that is out of bounds: the lower bound if it is the only one, else the
        default."""
        return default if self.ge is None or self.le is not None or self.lt is not None else self.ge


def setting(
    default: Any, *, choices: Sequence[Any] = (), resumable: bool | Change = False, **bounds: float | None
) -> Any:
    """The dataclass field of a setting.

    Args:
        default: the default value. It need not satisfy the bounds if it is None.
        choices: the values that the setting may have. Empty: any.
        resumable: whether a setting of the model may change when a run is resumed, or started from the weights of
            another run (checkpoint.load): it affects how weights are used or trained, not what they mean. A function:
            which changes are allowed.
        bounds: `ge`, `gt`, `le` and `lt` of a number, as in `Bounds`. None is always allowed for an optional setting.
    """
    metadata: dict[str, Any] = {"choices": tuple(choices)} if choices else {}
    if bounds:
        metadata["bounds"] = Bounds(**bounds)
    if resumable:
        metadata["resumable"] = resumable if callable(resumable) else lambda old, new: True
    return field(default=default, metadata=metadata)
