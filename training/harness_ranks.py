"""What ranks do together in an evaluation on tasks: rank 0 runs lm-eval (training/harness_model.py) and broadcasts what
it asks of the model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from models.scoring import Request, score_continuations
from training.builder import BuiltModel
from training.generate import generate

Stop = Callable[[list[int]], bool]


def score(built: BuiltModel, requests: list[Request], batch_size: int) -> list[tuple[float, int]]:
    return score_continuations(built.engine, requests, batch_size)


def continue_text(built: BuiltModel, prompt: list[int], settings: dict[str, Any], stop: Stop | None) -> list[int]:
    """The tokens that follow a prompt. Every rank calls this together; `stop` is rank 0's and looks at the tokens so
    far."""
    found: list[int] = []
    for token in generate(built, prompt, **settings):
        found.append(token)
        ended = torch.tensor([stop is not None and stop(found)], dtype=torch.int32, device=built.runtime.device)
        dist.broadcast(ended, 0)
        if ended.item():
            break
    return found


_OPERATIONS: dict[str, Callable[..., Any]] = {"score": score, "continue": continue_text}


def broadcast(built: BuiltModel, message: Any) -> Any:
    if built.runtime.world.size == 1:
        return message
    box = [message]
    dist.broadcast_object_list(box, 0, device=built.runtime.device)
    return box[0]


def follow(built: BuiltModel) -> str | None:
    """On the other ranks: computes what rank 0 asks for, until it has finished. Returns the message of its ValueError,
    if it has failed with one."""
    while True:
        name, *arguments = broadcast(built, None)
        if name == "end":
            return arguments[0]
        _OPERATIONS[name](built, *arguments, *([None] if name == "continue" else []))
