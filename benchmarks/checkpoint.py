"""`python -m benchmarks.checkpoint`: measures how long a checkpoint blocks training, written synchronously and in the
background (`checkpoint.asynchronous`). Weights and both of Adam's moments are fp32, 12 bytes per parameter.

With `--ranks N`, of N data-parallel ranks on this machine, each file written by one of them; the slowest rank counts.
`--modelled` measures nothing: it prints what a cost model says of a large model on up to 16,384 GPUs.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measurement import quietly
from conf.schema import Config, ModelConfig, MoeConfig, TrainConfig
from parallel.env import World

SEQUENCE = 64
EVERY = 100
"""Steps between two checkpoints."""


class Blocked(NamedTuple):
    """Medians in seconds."""

    mib: float
    """Size of a checkpoint."""
    synchronous: float
    """For which training is blocked."""
    asynchronous: float
    """For which training is blocked."""
    complete: float
    """Until an asynchronous checkpoint is written."""
    step: float
    """A training step."""


def configuration(hidden: int, layers: int, ranks: int = 1) -> Config:
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": 8, "ffn_hidden_size": 2 * hidden}
    model = ModelConfig(**sizes, vocab_size=8192, moe=MoeConfig(num_experts=8))
    train = TrainConfig(micro_batch_size=1, global_batch_size=ranks, sequence_length=SEQUENCE)
    return Config(model=model, train=train, precision="fp32")


def measure(
    hidden: int, layers: int, repetitions: int, world: World | None = None, folder: Path | None = None
) -> Blocked:
    """Of one rank.

    Args:
        world: every rank of it calls this together; None: a single process.
        folder: an existing one, the same on all ranks; None: a temporary one.
    """
    from parallel.checkpoint import Checkpointer
    from training import builder

    world = world or World()
    started = builder.start(configuration(hidden, layers, world.size), world, train=True)
    engine, root = started.engine, folder or Path(tempfile.mkdtemp())
    tokens_BS = torch.randint(0, 8192, (1, SEQUENCE))
    batch = {"tokens": tokens_BS, "labels": tokens_BS, "positions": torch.arange(SEQUENCE)[None]}
    saver, at_once, stalls, wholes, steps = Checkpointer(root, engine, keep=1), [], [], [], []
    try:
        for repetition in range(2 * repetitions + 2):
            begun = time.perf_counter()  # the first step creates Adam's moments
            engine.update(1e-4, loss=engine.forward_backward([batch], step=repetition + 1).item())
            steps.append(time.perf_counter() - begun)
            counted = {"step": repetition, "samples": 1, "tokens": SEQUENCE, "updates": repetition + 1}
            state = counted | {"world_size": world.size}
            begun = time.perf_counter()
            if repetition % 2:
                saver.save(state)
                at_once.append(time.perf_counter() - begun)
                continue
            saver.begin_save(state)
            stall = time.perf_counter() - begun
            while not saver._pending_save[0].is_done():
                time.sleep(0.01)  # stands for training
            wholes.append(time.perf_counter() - begun)
            started.engine.runtime.groups.world.barrier().wait()  # another rank's writing would not block a step
            settled = time.perf_counter()
            saver.finalize_save(wait=True)
            stalls.append(stall + time.perf_counter() - settled)
        size = sum(path.stat().st_size for path in next(root.glob("step_*")).iterdir()) / 2**20
    finally:
        if world.rank == 0:
            shutil.rmtree(root)
        builder.stop()
    return Blocked(size, *(statistics.median(seconds[1:]) for seconds in (at_once, stalls, wholes, steps)))


def _on_rank(world: World, hidden: int, layers: int, repetitions: int, folder: Path) -> Blocked:
    with quietly():
        return measure(hidden, layers, repetitions, world, folder)


def slowest(hidden: int, layers: int, repetitions: int, ranks: int) -> Blocked:
    """The largest value of any rank."""
    from parallel.local_launcher import run_ranks

    folder = Path(tempfile.mkdtemp())
    told = run_ranks(ranks, _on_rank, hidden, layers, repetitions, folder, timeout=3600)
    return Blocked(*map(max, zip(*told, strict=True)))


EXPERTS, DENSE, ACTIVE = 654e9, 17e9, 37e9
"""Parameters of DeepSeek-V3 (arXiv:2412.19437): of routed experts, all others, and those that a token uses."""
TOKENS = 8192
"""Of a step on each GPU."""
FLOPS, MFU = 989e12, 0.4
"""Of an H100, bf16 without sparsity (NVIDIA's data sheet), and the share of it that training reaches."""
LINK, COPY, MEMORY = 50e9, 6e9, 3.35e12
"""Bytes per second: of a GPU's 400 Gb/s network, to pageable host memory, and of GPU memory (data sheet)."""
LATENCY, COLLECTIVES = 20e-6, 12
"""Seconds of a small collective for each doubling of the ranks, and how many a checkpoint takes."""
STATE = 12
"""Bytes of a parameter in a checkpoint."""


def modelled(ranks: int) -> tuple[float, float]:
    """(seconds for which training is blocked, seconds of a step) with pp8 and ep8 on a multiple of 64 ranks.

    Every rank checks its shard of the optimizer, sends it to the ranks that write, and these copy what they get to host
    memory. At most WRITERS ranks of a group write, but no file has more than FILE_BYTES.
    """
    from parallel.checkpoint_plan import writers_wanted

    held, written = 0.0, 0.0
    for parameters, replicas in ((DENSE / 8, ranks // 8), (EXPERTS / 64, ranks // 64)):
        nbytes = STATE * parameters
        held += nbytes / replicas
        written += nbytes / min(replicas, writers_wanted(int(nbytes)))
    stall = held / MEMORY + max(held, written) / LINK + written / COPY + COLLECTIVES * LATENCY * math.log2(ranks)
    return stall, 6 * ACTIVE * TOKENS / (FLOPS * MFU)


def print_modelled() -> None:
    print(f"DeepSeek-V3, pp8 ep8, {TOKENS:,} tokens per GPU and step, a checkpoint in {EVERY} steps:")
    print("   ranks    blocked      step   share of all steps")
    for ranks in (512, 2048, 4096, 16384):
        stall, step = modelled(ranks)
        print(f"{ranks:>8,} {stall:>8.2f} s {step:>7.2f} s   {stall / EVERY / step:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--modelled", action="store_true")
    given = parser.parse_args()
    if given.modelled:
        return print_modelled()
    with quietly():
        if given.ranks == 1:
            found = measure(given.hidden, given.layers, given.repetitions)
        else:
            found = slowest(given.hidden, given.layers, given.repetitions, given.ranks)
    at_once, stall = found.synchronous, found.asynchronous
    print(f"checkpoint of {found.mib:,.0f} MiB, median of {given.repetitions}: training is blocked for")
    print(f"  synchronous               {at_once:7.3f} s")
    done = f"complete after {found.complete:.3f} s"
    print(f"  in the background         {stall:7.3f} s  ({stall / at_once:.2f} of it; {done})")
    print(f"a step of {SEQUENCE} tokens takes {found.step:.3f} s: with a checkpoint in {EVERY} steps, training is")
    print(f"blocked in the background for {stall / EVERY / found.step:.2%} of the time")


if __name__ == "__main__":
    main()
