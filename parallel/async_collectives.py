"""Collectives with gradients that run while something else is computed. All act along dimension 0."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Callable[[Tensor], tuple[Tensor, dist.Work]]
"""Starts to send x and returns what will arrive, with the handle to wait for."""


class Flight:
    """A collective under way while something else is computed, and the one that brings its gradient back."""

    def __init__(self, there: Collective, back: Collective):
        self.there, self.back = there, back
        self._under_way: tuple[Tensor, Tensor, dist.Work] | None = None

    def start(self, collective: Collective, x: Tensor) -> None:
        x = x.contiguous()
        self._under_way = (x, *collective(x))  # with x: the sender's memory must outlive the sending

    def wait(self) -> Tensor:
        """What arrived."""
        assert self._under_way is not None, "nothing is under way"
        _, arrived, work = self._under_way
        work.wait()
        self._under_way = None
        return arrived


def depart(x: Tensor, flight: Flight) -> Tensor:
    """Sends x on its way and returns a ticket for `arrive`. What is computed between the two runs meanwhile. So does
    its gradient in the backward pass, since autograd goes through operations in the reverse order of their forward
    pass: `arrive`'s gradient departs first and is waited for last."""
    return _Depart.apply(x, flight)


def arrive(ticket: Tensor, flight: Flight) -> Tensor:
    """Waits for what `depart` sent."""
    return _Arrive.apply(ticket, flight)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.start(flight.there, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(ctx.flight.back, grad)
        return grad.new_empty(0), None


def _start_exchange(send: list[int], receive: list[int], group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Any]:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    return out, dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)


def _start_gather(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Any]:
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    return out, dist.all_gather_into_tensor(out, x, group=group, async_op=True)


def _start_sum(group: dist.ProcessGroup, x: Tensor) -> tuple[Tensor, Any]:
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)


def exchanging(send: list[int], receive: list[int], group: dist.ProcessGroup) -> Flight:
    """Sends `send[r]` rows to rank r and receives `receive[r]` rows from it; the gradient travels back."""
    return Flight(partial(_start_exchange, send, receive, group), partial(_start_exchange, receive, send, group))


def gathering(group: dist.ProcessGroup) -> Flight:
    """Every rank's rows, in rank order; the gradient is summed back onto the ranks. All hold the same shape."""
    return Flight(partial(_start_gather, group), partial(_start_sum, group))


def summing(group: dist.ProcessGroup) -> Flight:
    """The inverse of gathering: the sum over ranks of this rank's 1/n of the rows."""
    return Flight(partial(_start_sum, group), partial(_start_gather, group))


def fly(x: Tensor, flight: Flight) -> Tensor:
    """There at once, with nothing computed meanwhile."""
    return arrive(depart(x, flight), flight)
