"""Shared experts: their answer is in test_layer.py and test_against_others.py; here, when they compute."""

from typing import Any

import pytest

from conf.schema import MoeConfig, ParallelConfig
from parallel import async_collectives
from parallel.env import World
from tests.parallel.helpers import started


class RecordedWork:
    """A handle that says when it is waited for."""

    def __init__(self, work: Any, events: list[str], name: str):
        self.work, self.events, self.name = work, events, name

    def wait(self) -> None:
        self.events.append(f"{self.name} waited for")
        self.work.wait()


def events_of_a_pass(world: World, dispatcher: str) -> list[str]:
    """What happened in which order in a forward and backward pass of a layer over two ranks."""
    from tests.moe.helpers import random, run_layer, sparse_layer, tiny

    events: list[str] = []

    def recording(name: str, plain: Any) -> Any:
        def start(*args: Any) -> Any:
            out, work = plain(*args)
            events.append(f"{name} started")
            return out, RecordedWork(work, events, name)

        return start

    originals = {name: getattr(async_collectives, name) for name in ("_all_to_all", "_all_gather", "_reduce_scatter")}
    for name, plain in originals.items():
        setattr(async_collectives, name, recording(name.removeprefix("_"), plain))
    try:
        with started(world, ParallelConfig(ep=2)) as runtime:
            moe = MoeConfig(num_experts=4, top_k=2, num_shared_experts=1, dispatcher=dispatcher)
            layer = sparse_layer(tiny(moe), runtime)
            layer.shared.register_forward_hook(lambda *_: events.append("shared experts"))
            layer.shared.register_full_backward_hook(lambda *_: events.append("shared experts' gradient"))
            layer.experts.register_forward_hook(lambda *_: events.append("experts"))
            x_SBD = random(4, 2, 8, seed=world.rank).requires_grad_()
            run_layer(layer, x_SBD).square().sum().backward()
    finally:
        for name, plain in originals.items():
            setattr(async_collectives, name, plain)
    return events


@pytest.mark.parametrize(
    ("dispatcher", "there", "back"),
    [
        ("all_to_all", "all_to_all", "all_to_all"),
        ("all_gather", "all_gather", "reduce_scatter"),
    ],
)
def test_compute_while_rows_travel(dispatcher: str, there: str, back: str, ranks) -> None:
    """And their gradients while the gradients of those rows travel back."""
    for events in ranks.run(2, events_of_a_pass, dispatcher, timeout=60):
        first = [f"{there} started", "shared experts", f"{there} waited for", "experts"]
        assert events[:4] == first, events
        last = [f"{back} started", "shared experts' gradient", f"{back} waited for"]
        assert events[-3:] == last, events
