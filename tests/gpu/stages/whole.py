"""Whole models, or as many of their layers as one card holds, trained on one card at their real widths: what a plan
predicts, to be held against it. Each run is a process of its own."""

import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parallel.device_env import set_device_variables
from tests.gpu.stages import steps
from tests.gpu.stages.common import DEVICE, REHEARSE, attempt, seconds

SMALL = "optim.grad_dtype=bf16 optim.state_dtype=bf16"
LONG = "train.sequence_length=4096"
RUNS = [
    f"model=olmoe_1b_7b {LONG} train.micro_batch_size=2 {SMALL}",
    f"model=qwen3_30b_a3b model.num_layers=6 {LONG} train.micro_batch_size=2",
    f"model=mixtral_8x7b model.num_layers=3 {LONG} train.micro_batch_size=2 {SMALL}",
    "model=switch_base_8 train.sequence_length=512 train.micro_batch_size=32",
    f"model=olmoe_1b_7b {LONG} train.micro_batch_size=4 {SMALL} model.recompute=[full]",
    f"model=qwen3_30b_a3b model.num_layers=6 {LONG} train.micro_batch_size=2 model.recompute=[norm,activation]",
    f"model=olmoe_1b_7b {LONG} train.micro_batch_size=2 {SMALL} precision=fp8",
]
if REHEARSE:
    RUNS = ["model=tiny_switch train.sequence_length=64 train.micro_batch_size=2 model.vocab_size=256"]
STEPS = 5


def configuration(overrides: list[str]) -> object:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from conf.schema import Config

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(Path("conf").resolve()), version_base=None):
        values = compose("config", overrides)
    size = values.train.micro_batch_size
    OmegaConf.update(values, "train.global_batch_size", 2 * size)
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    return config


def measure(overrides: list[str]) -> dict[str, object]:
    import torch

    from benchmarks.measurement import quietly
    from parallel.env import World
    from parallel.layout import Layout
    from training import builder
    from training.memory_estimate import memory_per_rank

    config = configuration(overrides)
    train, begin = config.train, time.perf_counter()
    with quietly():
        started = builder.start(config, World(), train=True)
    found = {
        "start_seconds": time.perf_counter() - begin,
        "estimated_gb": memory_per_rank(config, Layout(1), bf16=True).total / 1e9,
    }
    text = torch.randint(0, config.model.vocab_size, (train.micro_batch_size, train.sequence_length + 1), device=DEVICE)
    positions = torch.arange(train.sequence_length, device=DEVICE).expand(train.micro_batch_size, -1)
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "positions": positions.contiguous(),
    }

    def step() -> None:
        loss = started.engine.forward_backward([dict(batch), dict(batch)], step=1)
        started.engine.update(1e-5, loss=loss.item())

    middle = seconds({"step": step}, STEPS, warm=2)["step"]
    tokens = 2 * train.micro_batch_size * train.sequence_length
    found |= {
        "seconds": middle,
        "tokens_per_second": tokens / middle,
        "tflops": started.cost.flops_per_token * tokens / middle / 1e12,
    }
    if DEVICE.type == "cuda":
        found |= {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
        found["static_gb"] = torch.cuda.memory_allocated() / 1e9
    return found | steps.profiled(step, middle) | {"table": [list(row) for row in started.table]}


def apart(run: str) -> dict[str, object]:
    environment = dict(os.environ)
    set_device_variables(environment)
    command = [sys.executable, "-m", "tests.gpu.stages.whole", *run.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    if done.returncode:
        print(done.stderr[-6000:], flush=True)
        raise RuntimeError(next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no word"))
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        for run in RUNS:
            pool.submit(attempt, run, functools.partial(apart, run))


if __name__ == "__main__":
    if sys.argv[1:]:
        steps.prepare()
        steps.wait_for_the_card()
        print(json.dumps(measure(sys.argv[1:])))
    else:
        main()
