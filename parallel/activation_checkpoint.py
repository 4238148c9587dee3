"""Activation checkpointing: parts of the forward pass are recomputed in the backward pass instead of being saved.

Routing decisions must not be recomputed: a token whose scores for two experts are nearly equal could be routed to
another expert by a rounding difference. `save_for_recompute` marks the tensors that hold them; they are always saved.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel import batch_context

T = TypeVar("T")

LIBRARY = torch.library.Library("switchyard", "DEF")
"""Operators that the policy of `checkpointed` can name. `torch.library.custom_op` is not used: its wrapper takes half a
millisecond of host time per call."""
LIBRARY.define("save_for_recompute(Tensor routing) -> Tensor")
LIBRARY.impl("save_for_recompute", Tensor.clone, "CompositeExplicitAutograd")


def save_for_recompute(routing: Tensor) -> Tensor:
    """A copy of integers or booleans. Inside `checkpointed`, recomputation returns the saved copy."""
    return torch.ops.switchyard.save_for_recompute.default(routing)


MUST_SAVE_OPS = {torch.ops.switchyard.save_for_recompute.default}
"""Operators whose results are always saved. Kernels that compute routing decisions add theirs (ops.triton.router)."""
MATMUL_OPS = frozenset({torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default})


def _policy(
    save_ops: frozenset[object], context: object, operation: object, *args: object, **kwargs: object
) -> CheckpointPolicy:
    must_save = operation in MUST_SAVE_OPS or operation in save_ops
    return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(function: Callable[..., T], *args: object, save_ops: frozenset[object] = frozenset()) -> T:
    """function(*args) under selective activation checkpointing. The function must have no side effects: it runs twice.

    Args:
        save_ops: operators whose results are saved, besides MUST_SAVE_OPS; MATMUL_OPS are the matrix products.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, save_ops))
    # The recomputation runs when another micro-batch may be the current one.
    run = partial(_within, batch_context.current(), function)
    # Random numbers are hashes of a key (moe.counter_rng): there is no generator state to restore.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _within(batch_ctx: batch_context.BatchContext | None, function: Callable[..., T], *args: object) -> T:
    with batch_context.entered(batch_ctx):
        return function(*args)


def checkpoint_without_output(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], consumer: Callable[[Tensor], T]
) -> T:
    """consumer(function(*inputs)), where the output of `function` is not saved for the backward pass but recomputed
    from the inputs.

    For functions that are cheap, have a large output and whose input is saved anyway, such as norms.
    """
    if not torch.is_grad_enabled():
        return consumer(function(*inputs))
    output = function(*inputs)
    # The storage's own address: that of its values is not unique where it is empty.
    storage = output.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    sources = [x.detach() for x in inputs]
    uses, again = 0, None

    def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
        nonlocal uses
        if tensor.untyped_storage()._cdata != storage:  # pyright: ignore[reportPrivateUsage]
            return tensor
        uses += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        nonlocal uses, again
        if isinstance(packed, Tensor):
            return packed
        if again is None:
            with torch.no_grad():
                again = function(*sources)
        found, uses = again.as_strided(*packed), uses - 1
        if uses <= 0:
            again = None
        return found

    with saved_tensors_hooks(pack, unpack):
        return consumer(output)
