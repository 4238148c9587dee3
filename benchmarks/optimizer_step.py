"""`python -m benchmarks.optimizer_step [overrides]`: how long the update of the weights takes with AdamW and with Muon,
beside the forward and backward passes of a step, on one rank and random tokens.

Prints the fastest of several repetitions. On a CPU also the time that all its threads worked, which other processes
disturb less.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.published import composed
from conf.schema import Config
from parallel.env import World

REPETITIONS = 3


def fastest(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, seconds of CPU time), each of the fastest repetition after a first one."""
    found = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = zip(*found[1:], strict=True)
    return min(wall), min(cpu)


def measure(config: Config) -> dict[str, tuple[float, float]]:
    """The passes of a whole step, and the update."""
    from training import builder

    train = config.train
    shape = (train.micro_batch_size, train.sequence_length)
    engine = builder.start(config, World(), train=True).engine
    tokens = torch.randint(0, config.model.vocab_size, shape)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "positions": torch.arange(shape[1]).expand(shape)}
    batches = [batch] * (train.global_batch_size // shape[0])
    found = {"forward and backward": fastest(lambda: engine.forward_backward(batches, step=1))}
    found[f"update by {config.optim.name}"] = fastest(lambda: engine.update(1e-4, loss=1.0))
    builder.stop()
    return found


def main(overrides: list[str]) -> None:
    config = composed(["model=tiny_switch", *overrides])
    for name in ("adamw", "muon"):
        for what, (wall, cpu) in measure(replace(config, optim=replace(config.optim, name=name))).items():
            print(f"{what:<24} {1e3 * wall:9.1f} ms   {1e3 * cpu:9.1f} ms of CPU time")


if __name__ == "__main__":
    main(sys.argv[1:])
