"""Asynchronous collectives with gradients: computation can run between starting one and waiting for its result, in the
forward pass and in the backward pass. All act along dimension 0."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LaunchFn = Callable[[Tensor], tuple[Tensor, dist.Work]]
"""Launches a collective on x and returns (output, work): the output is valid once work.wait() has returned."""


class AsyncCollective:
    """A collective and the collective that computes its gradient.

    Args:
        forward: launches the collective.
        backward: launches the collective of the gradient.
    """

    def __init__(self, forward: LaunchFn, backward: LaunchFn):
        self.forward, self.backward = forward, backward
        self._pending: tuple[Tensor, Tensor, dist.Work] | None = None

    def launch(self, collective: LaunchFn, x: Tensor) -> None:
        x = x.contiguous()
        self._pending = (x, *collective(x))  # keeps x alive: its memory is read until the collective has completed

    def wait(self) -> Tensor:
        """Waits for the collective that was launched last and returns its output."""
        assert self._pending is not None, "no collective is pending"
        _, output, work = self._pending
        work.wait()
        self._pending = None
        return output


def start_collective(x: Tensor, collective: AsyncCollective) -> Tensor:
    """Launches a collective on x and returns a handle for `wait_collective`.

    What is computed between the two calls overlaps with the collective. The same holds in the backward pass: autograd
    runs operations in the reverse order of the forward pass, so `wait_collective` launches the gradient's collective
    and `start_collective` waits for it.
    """
    return _StartCollective.apply(x, collective)


def wait_collective(handle: Tensor, collective: AsyncCollective) -> Tensor:
    """Waits for a collective that `start_collective` launched and returns its output."""
    return _WaitCollective.apply(handle, collective)


class _StartCollective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        collective.launch(collective.forward, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, handle: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.wait(), None


class _WaitCollective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        return collective.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.collective.launch(ctx.collective.backward, grad)
        return grad.new_empty(0), None


class JoinedRows:
    """The rows of several collectives in one tensor, which each collective writes its part of: joining them is no
    copy."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self._parts: list[Tensor] = []
        self._whole: Tensor | None = None

    def output(self, index: int) -> Callable[[Tensor], Tensor]:
        """Where collective `index` writes, given its input."""

        def part(x: Tensor) -> Tensor:
            if self._whole is None:
                self._whole = x.new_empty((sum(self.lengths), *x.shape[1:]))
                # Tensors of their own: what is written into one part must not count as a change of the others.
                views = self._whole.split(self.lengths)
                storage = self._whole.untyped_storage()
                self._parts = [x.new_empty(0).set_(storage, v.storage_offset(), v.shape, v.stride()) for v in views]
            return self._parts[index]

        return part

    def take(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole, once all parts are there."""
        assert self._whole is not None and [t.data_ptr() for t in parts] == [t.data_ptr() for t in self._parts]
        whole, self._whole, self._parts = self._whole, None, []
        return whole


class SplitRows(torch.autograd.Function):
    """Parts of x whose gradients the collectives of the backward pass write into `gradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: JoinedRows) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return x.split(gradients.lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradients.take(grads), None


class JoinRows(torch.autograd.Function):
    """The parts that collectives wrote into `rows`, as one tensor."""

    @staticmethod
    def forward(ctx: Any, rows: JoinedRows, *parts: Tensor) -> Tensor:
        ctx.lengths = rows.lengths
        return rows.take(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.lengths)


Output = Callable[[Tensor], Tensor]
"""Where a collective writes, given its input."""


def _all_to_all(
    send: list[int], receive: list[int], group: dist.ProcessGroup, output: Output | None, x: Tensor
) -> tuple[Tensor, Any]:
    out = output(x) if output else x.new_empty((sum(receive), *x.shape[1:]))
    return out, dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)


def _all_gather(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Any]:
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    return out, dist.all_gather_into_tensor(out, x, group=group, async_op=True)  # pyright: ignore[reportDeprecated]


def _reduce_scatter(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Any]:
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)  # pyright: ignore[reportDeprecated]


def async_all_to_all(
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    output: Output | None = None,
    gradient: Output | None = None,
) -> AsyncCollective:
    """An all-to-all that sends `send[r]` rows to rank r and receives `receive[r]` rows from it. Its gradient is the
    all-to-all in the other direction.

    Args:
        output, gradient: where its result and its gradient are written; None: to new tensors.
    """
    forward = partial(_all_to_all, send, receive, group, output)
    return AsyncCollective(forward, partial(_all_to_all, receive, send, group, gradient))


def async_all_gather(group: dist.ProcessGroup) -> AsyncCollective:
    """An all-gather in rank order of inputs of the same shape. Its gradient is a reduce-scatter."""
    return AsyncCollective(partial(_all_gather, group), partial(_reduce_scatter, group))


def async_reduce_scatter(group: dist.ProcessGroup) -> AsyncCollective:
    """A reduce-scatter (sum). Its gradient is an all-gather."""
    return AsyncCollective(partial(_reduce_scatter, group), partial(_all_gather, group))


def run_collective(x: Tensor, collective: AsyncCollective) -> Tensor:
    """Starts a collective on x, waits for it at once and returns its output."""
    return wait_collective(start_collective(x, collective), collective)
