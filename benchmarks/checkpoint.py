"""`python -m benchmarks.checkpoint`: measures how long a checkpoint blocks training, written synchronously and in the
background (`checkpoint.asynchronous`). One rank; weights and both of Adam's moments are fp32, 12 bytes per
parameter."""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measurement import quietly
from conf.schema import Config, ModelConfig, MoeConfig, TrainConfig

SEQUENCE = 64


def configuration(hidden: int, layers: int) -> Config:
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": 8, "ffn_hidden_size": 2 * hidden}
    model = ModelConfig(**sizes, vocab_size=8192, moe=MoeConfig(num_experts=8))
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, sequence_length=SEQUENCE)
    return Config(model=model, train=train, precision="fp32")


def measure(hidden: int, layers: int, repetitions: int) -> tuple[float, float, float, float]:
    """(MiB of a checkpoint, median seconds for which training is blocked by a synchronous one, by an asynchronous one,
    and until the latter is complete)."""
    from parallel.checkpoint import Checkpointer
    from parallel.env import World
    from training import builder

    started = builder.start(configuration(hidden, layers), World(), train=True)
    engine, folder = started.engine, Path(tempfile.mkdtemp())
    tokens_BS = torch.randint(0, 8192, (1, SEQUENCE))
    batch = {"tokens": tokens_BS, "labels": tokens_BS, "positions": torch.arange(SEQUENCE)[None]}
    engine.update(1e-4, loss=engine.forward_backward([batch], step=1).item())  # creates Adam's moments
    saver, at_once, stalls, wholes = Checkpointer(folder, engine, keep=1), [], [], []
    try:
        for repetition in range(2 * repetitions + 2):
            state = {"step": repetition, "samples": 1, "tokens": SEQUENCE, "updates": 1, "world_size": 1}
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
            settled = time.perf_counter()
            saver.finalize_save(wait=True)
            stalls.append(stall + time.perf_counter() - settled)
        size = sum(path.stat().st_size for path in next(folder.glob("step_*")).iterdir()) / 2**20
    finally:
        shutil.rmtree(folder)
        builder.stop()
    return size, *(statistics.median(seconds[1:]) for seconds in (at_once, stalls, wholes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    with quietly():
        size, at_once, stall, whole = measure(given.hidden, given.layers, given.repetitions)
    print(f"checkpoint of {size:,.0f} MiB, median of {given.repetitions}: training is blocked for")
    print(f"  synchronous               {at_once:7.3f} s")
    print(f"  in the background         {stall:7.3f} s  ({stall / at_once:.2f} of it; complete after {whole:.3f} s)")


if __name__ == "__main__":
    main()
