"""What the implementations by TransformerEngine have in common (model.transformer_impl).

None of them has run on a GPU yet: they are tested against stand-ins with the package's recorded signatures
(tests/stand_ins), and verified against the reference at the start of every run.
"""

from collections.abc import Callable
from typing import TypeVar

from ops.operation import Unavailable, brief, is_absent
from ops.run_context import RunContext

T = TypeVar("T")
NAME = "TransformerEngine"
REFUSAL = "model.transformer_impl=transformer_engine {reason}. Use model.transformer_impl=auto"
"""Operation.refusal."""


def is_meant(context: RunContext) -> bool:
    """Whether a run may use the package. Without an optimizer there is nothing to gain: most of what its layers do is
    for the backward pass."""
    return context.train and context.model.transformer_impl != "local"


def asked(context: RunContext) -> str:
    """Operation.asked: of an operation that model.transformer_impl=transformer_engine is about."""
    return NAME if context.train and context.model.transformer_impl == "transformer_engine" else "auto"


def load(make: Callable[[], T]) -> T:
    """make(), which imports the package.

    Raises:
        ModuleNotFoundError: it is not installed.
        Unavailable: it does not import; a half-installed package raises more than ImportError.
    """
    needs = "needs the package transformer-engine, which"
    try:
        return make()
    except Exception as error:
        if is_absent(error):
            raise ModuleNotFoundError(f"{needs} is not installed", name="transformer_engine") from error
        raise Unavailable(f"{needs} does not import ({brief(error)})") from error
