"""Full training steps of a model as wide as Mixtral (2 layers) and one as wide as Qwen3-30B-A3B (4 layers), in bf16 and
FP8, beside Megatron-Core's and Transformers': tokens a second, MFU, launches, waits of the host, idle share, the
kernels that take most, and peak memory beside the estimate. Each contender is a process of its own."""

import contextlib
import fcntl
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from parallel.device_env import set_device_variables
from tests.gpu.stages.common import DEVICE, REHEARSE, attempt, emit, seconds, synchronize

MODELS = {
    "Mixtral, 2 layers": {"layers": 2, "hidden": 4096, "heads": 32, "width": 14336, "experts": 8, "top_k": 2},
    "Qwen3, 4 layers": {"layers": 4, "hidden": 2048, "heads": 16, "width": 768, "experts": 128, "top_k": 8},
}
BATCH = {"vocabulary": 32000, "sequence": 2048, "batch": 4}
if REHEARSE:
    MODELS = {"tiny": {"layers": 2, "hidden": 128, "heads": 2, "width": 128, "experts": 4, "top_k": 2}}
    BATCH = {"vocabulary": 256, "sequence": 32, "batch": 2}
CONTENDERS = ("ours bf16", "ours fp8", "megatron", "transformers")
STEPS = 8


def configuration(shape: dict[str, int], precision: str) -> Any:
    from conf.schema import Config, ModelConfig, MoeConfig, OptimConfig, TrainConfig

    model = ModelConfig(
        num_layers=shape["layers"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        ffn_hidden_size=shape["width"],
        vocab_size=BATCH["vocabulary"],
        activation="swiglu",
        moe=MoeConfig(num_experts=shape["experts"], top_k=shape["top_k"], capacity_factor=None),
    )
    train = TrainConfig(
        micro_batch_size=BATCH["batch"], global_batch_size=BATCH["batch"], sequence_length=BATCH["sequence"], steps=1
    )
    return Config(model=model, train=train, optim=OptimConfig(lr=1e-4), precision=precision)


def contender(name: str, shape: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """(a step, what else is known)."""
    import torch

    from benchmarks import train_step
    from parallel import process_groups
    from parallel.env import World
    from parallel.layout import Layout

    text = torch.randint(0, BATCH["vocabulary"], (BATCH["batch"], BATCH["sequence"] + 1))
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    if name.startswith("ours"):
        from training import builder
        from training.memory_estimate import memory_per_rank

        config = configuration(shape, name.split()[1])
        started = builder.start(config, World(), train=True)
        estimate = memory_per_rank(config, Layout(1), bf16=True)
        known = {
            "flops_per_token": started.cost.flops_per_token,
            "estimated_gb": estimate.total / 1e9,
            "table": [list(row) for row in started.table],
        }
        return train_step.implementation(started.engine, *batch).step, known
    config = configuration(shape, "bf16")
    if name == "megatron":
        return train_step.megatron(
            config, process_groups.start(World(), Layout(1), seed=1, timeout=60), *batch
        ).step, {}
    return train_step.transformers(config, DEVICE, "grouped_mm", *batch).step, {}


def measure(name: str, shape: dict[str, int]) -> dict[str, Any]:
    import torch

    from benchmarks.measurement import quietly

    begin = time.perf_counter()
    with quietly():
        step, known = contender(name, shape)
    known |= {"start_seconds": time.perf_counter() - begin}
    tokens, middle = BATCH["batch"] * BATCH["sequence"], seconds({"step": step}, STEPS, warm=2)["step"]
    found: dict[str, Any] = {"seconds": middle, "tokens_per_second": tokens / middle, **known}
    if "flops_per_token" in found:
        found["tflops"] = found.pop("flops_per_token") * tokens / middle / 1e12
        if DEVICE.type == "cuda":
            from training.metrics import peak_flops

            peak = peak_flops(torch.cuda.get_device_name(), "bf16")
            found["mfu_of_bf16_peak"] = peak and found["tflops"] * 1e12 / peak
    if DEVICE.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        found["host_waits"] = sum("synchroniz" in str(w.message) for w in waits)
    return found | profiled(step, middle)


def profiled(step: Any, middle: float) -> dict[str, Any]:
    import torch

    with torch.profiler.profile() as profile:
        step()
        synchronize()
    events = profile.key_averages()
    kernels = [
        e for e in events if getattr(e, "self_device_time_total", 0) > 0 and "cuda" in str(e.device_type).lower()
    ]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    top = sorted(kernels, key=lambda e: e.self_device_time_total, reverse=True)[:15]
    return {
        "launches": sum(e.count for e in kernels),
        "idle_share": max(0.0, 1 - busy / middle),
        "top_kernels": [[e.key[:100], e.count, e.self_device_time_total / 1e3] for e in top],
    }


def prepare() -> None:
    """What a contender can do while another one has the card."""
    import training.builder  # noqa: F401

    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401


def wait_for_the_card() -> None:
    """One contender at a time, by a lock in the stage's folder. It goes with the process, as its memory does: a card
    does not hold two of them."""
    _held.append((Path(os.environ["DAY_OUT"]) / "card.lock").open("w"))
    fcntl.flock(_held[0], fcntl.LOCK_EX)


_held: list[IO[str]] = []


def apart(name: str, model: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.stages.steps", "measure", name, model]
    environment = dict(os.environ)
    set_device_variables(environment)  # as every way of starting a run does
    limit = 300 if REHEARSE else 180  # also while another one has the card
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    if done.returncode:
        print(done.stderr[-6000:], flush=True)
        said = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in reversed(said) if "Error" in line), "no word"))
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    emit("batch", **BATCH)
    with ThreadPoolExecutor(2) as pool:  # one has the card, the next one imports
        for name in CONTENDERS:  # the slowest to start last
            for model in MODELS:
                pool.submit(attempt, f"{model}, {name}", functools.partial(apart, name, model))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        prepare()
        wait_for_the_card()
        print(json.dumps(measure(sys.argv[2], MODELS[sys.argv[3]])))
    else:
        main()
