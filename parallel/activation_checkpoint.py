"""Less memory for more arithmetic: what the backward pass needs is computed again instead of kept.

A router's choice must not be taken again: one rounding apart, a token between two experts would go back through the
one that it did not come from. So `decision` marks the tensors that say who goes where; they are kept, and used again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LIBRARY = torch.library.Library("switchyard", "DEF")
"""Operations that `recomputed` can tell from others. Defined without `torch.library.custom_op`, whose wrapper costs the
host half a millisecond a call."""
LIBRARY.define("decision(Tensor choice) -> Tensor")
LIBRARY.impl("decision", Tensor.clone, "CompositeExplicitAutograd")


def decision(choice: Tensor) -> Tensor:
    """The same integers or booleans. Inside `recomputed`, the second pass gets those of the first."""
    return torch.ops.switchyard.decision.default(choice)


DECISIONS = {torch.ops.switchyard.decision.default}
"""Operations whose results are always kept. A kernel that decides adds its own (ops.triton.router)."""
PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default})


def _policy(kept: frozenset[Any], context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    wanted = operation in DECISIONS or operation in kept
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Callable[..., Any], *args: Any, kept: frozenset[Any] = frozenset()) -> Any:
    """function(*args), of whose inside only the results of some operations are kept: the rest is computed again in the
    backward pass. The function must not have effects besides its result, or they happen twice.

    Args:
        kept: operations, besides DECISIONS; PRODUCTS are those of matrices.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    # Our random numbers are hashes of what they are for: there is no state to restore.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def with_output_recomputed(function: Callable[[Tensor], Tensor], x: Tensor, consumer: Callable[[Tensor], Any]) -> Any:
    """consumer(function(x)), where `function`'s output is not kept for the backward pass but computed again from x,
    which has to be there anyway. For cheap functions with an output that is large, such as norms."""
    if not torch.is_grad_enabled():
        return consumer(function(x))
    output = function(x)
    storage = output.untyped_storage().data_ptr()
    source = x.detach()
    uses, again = 0, None

    def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
        nonlocal uses
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        uses += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        nonlocal uses, again
        if isinstance(packed, Tensor):
            return packed
        if again is None:
            with torch.no_grad():
                again = function(source)
        found, uses = again.as_strided(*packed), uses - 1
        if uses <= 0:
            again = None
        return found

    with saved_tensors_hooks(pack, unpack):
        return consumer(output)
