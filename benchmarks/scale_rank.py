"""Rank 0 of a world of a given size, whose figures benchmarks.scale prints."""

import contextlib
import os
import resource
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.mirror_world import Traffic, counted_requests, mirrored
from conf.model_schema import ModelConfig
from conf.moe_schema import MoeConfig
from conf.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)
from parallel.env import World

if TYPE_CHECKING:
    from training.builder import BuiltModel
    from training.trainer import Trainer

STEPS = 6
"""Steps that are measured, after one that is not."""
PARALLEL = ParallelConfig(tp=2, pp=2, ep=2)


def config_of(world: int, folder: Path) -> Config:
    """A tiny model whose global batch is two micro-batches per data-parallel rank."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}, of which {i % 7} are left.\n" for i in range(4000)))
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 512}
    dp = world // (PARALLEL.tp * PARALLEL.pp)
    return Config(
        model=ModelConfig(**sizes, moe=MoeConfig(num_experts=4, top_k=2)),  # pyright: ignore[reportArgumentType]
        parallel=PARALLEL,
        data=DataConfig(kind="text", files=[str(text)], cache_dir=str(folder / "cache")),
        train=TrainConfig(steps=STEPS + 1, micro_batch_size=1, global_batch_size=2 * dp, sequence_length=32),
        optim=OptimConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(loggers=[]),
        run=RunConfig(dir=str(folder / "run")),
        runtime=RuntimeConfig(threads=1),
        precision="fp32",
    )


def memory() -> int:
    """Bytes in physical memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def others_join(world: World) -> Generator[None]:
    """The other ranks of a world meet rank 0."""
    import torch.distributed as dist

    def join() -> None:
        store = dist.TCPStore(world.address, world.port, world.size, False, wait_for_workers=False)
        shared = dist.PrefixStore(f"{world.secret} 0", store)
        if shared.add("joined", world.size - 1) == world.size:
            shared.set("all", "")

    thread = threading.Thread(target=join)
    thread.start()
    yield
    thread.join()


@contextlib.contextmanager
def _timed_groups() -> Generator[list[float]]:
    """Processor seconds of each time that a rank's process groups are made inside."""
    from parallel import process_groups

    build, took = process_groups.build_groups, list[float]()

    def timed(*args: Any, **named: Any) -> Any:
        began = time.process_time()
        groups = build(*args, **named)
        took.append(time.process_time() - began)
        return groups

    process_groups.build_groups = timed
    try:
        yield took
    finally:
        process_groups.build_groups = build


class Beside:
    """The messages that are not the model's: those of all groups but the model's own."""

    def __init__(self, built: "BuiltModel", traffic: Traffic) -> None:
        self.traffic = traffic
        self.models = {group.group_name for name, group in built.runtime.groups.named() if name != "world"}

    def taken(self, times: int = 1) -> tuple[float, float]:
        """(messages, bytes received) since the last call, divided by `times`."""
        counts = (self.traffic.messages, self.traffic.received)
        messages, received = (sum(n for name, n in of.items() if name not in self.models) for of in counts)
        self.traffic.clear()
        return round(messages / times, 2), round(received / times)


class _Over(Exception):
    """The last step is over."""


def _steps(trainer: "Trainer", beside: Beside) -> dict[str, float]:
    """The figures of a step, with its logged line, from the beginning of the second step to the end of the last."""
    engine, save, began = trainer.built.engine, trainer.save, list[float]()
    compute_gradients = engine.compute_gradients

    def step(*args: Any, **named: Any) -> None:
        if len(began) == 1:
            beside.taken()
        began.append(time.process_time())
        compute_gradients(*args, **named)

    def over() -> None:
        raise _Over

    engine.compute_gradients, trainer.save = step, over
    try:
        with contextlib.suppress(_Over):
            trainer.run()
        milliseconds = 1e3 * (time.process_time() - began[1]) / STEPS
    finally:
        engine.compute_gradients, trainer.save = compute_gradients, save
    messages, received = beside.taken(STEPS)
    return {
        "messages per step": messages,
        "bytes per step": received,
        "host milliseconds per step": round(milliseconds, 1),
    }


def _checkpoint(trainer: "Trainer", beside: Beside) -> dict[str, float]:
    """The figures of the first checkpoint. The other ranks say that they hold what this rank holds, so that the proof
    that it is whole would fail: it is left out, and what fails is that their files are missing."""
    from parallel import checkpoint_plan

    beside.taken()
    proofs = checkpoint_plan.tiles_wrongly, checkpoint_plan.incomplete
    checkpoint_plan.tiles_wrongly = checkpoint_plan.incomplete = lambda *_: None
    try:
        with contextlib.suppress(AssertionError, ValueError):
            trainer.save()
    finally:
        checkpoint_plan.tiles_wrongly, checkpoint_plan.incomplete = proofs
    messages, received = beside.taken()
    return {"messages of a checkpoint": messages, "bytes of a checkpoint's metadata": received}


def measure(size: int, folder: Path) -> dict[str, float]:
    """The figures of rank 0."""
    from corpus.prepare import prepare
    from parallel import rendezvous
    from parallel.local_launcher import free_port
    from parallel.torch_private import ranks_of_groups
    from training import builder
    from training.console import Console
    from training.run_dir import open_run_dir
    from training.signals import StopRequest
    from training.trainer import Trainer

    config = config_of(size, folder)
    run_dir = open_run_dir(config)
    prepared = prepare(config.data, vocab_size=config.model.vocab_size, sequence_length=config.train.sequence_length)
    run_dir.adopt(config, prepared.tokenizer)
    world = World(0, size, 0, size, "127.0.0.1", free_port(), secret="scale")
    with mirrored() as traffic, contextlib.ExitStack() as stack:
        before, began, processor = memory(), time.perf_counter(), time.process_time()
        with counted_requests() as asked, others_join(world):
            store = rendezvous.join(world, 120.0)
        took = stack.enter_context(_timed_groups())
        built = builder.start(config, world, train=True, store=store)
        stack.callback(builder.stop)
        console, stop = stack.enter_context(Console(rank=1)), stack.enter_context(StopRequest(urgent=False))
        trainer = Trainer(built, run_dir, prepared, console, stop)
        trainer.restore()
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        beside = Beside(built, traffic)
        messages, received = beside.taken()
        return {
            "seconds of the start": round(seconds, 2),
            "processor seconds of the start": round(processor, 2),
            "process groups": len(ranks_of_groups()),
            "processor seconds to make them": round(took[0], 4),
            "store requests of the start": sum(asked.values()) - 1,  # one is that of the other ranks
            "messages of the start": messages,
            "bytes of the start": received,
            **_steps(trainer, beside),
            **_checkpoint(trainer, beside),
            "open files": open_files(),
            "connections to the store": size,
            "host MiB": round((memory() - before) / 2**20),
        }


def megatron_groups(size: int) -> dict[str, float]:
    """What Megatron-Core's own initialization makes on a rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from parallel.torch_private import fake_store

    calls, new_group = 0, dist.new_group

    def counting(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return new_group(*args, **named)

    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=size)
    dist.new_group = counting
    began = time.process_time()
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=PARALLEL.tp,
            pipeline_model_parallel_size=PARALLEL.pp,
            expert_model_parallel_size=PARALLEL.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        return {
            "process groups, Megatron-Core's": calls + 1,
            "processor seconds to make them, Megatron-Core's": round(time.process_time() - began, 2),
        }
    finally:
        dist.new_group = new_group
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def figures(_: World, size: int) -> dict[str, float]:
    """The figures of a world of `size` ranks, by their names in the table (a function for run_ranks)."""
    from parallel import megatron_compat
    from training.output_redirect import redirect_output

    redirection = redirect_output(0)
    try:
        megatron_compat.load()
        with tempfile.TemporaryDirectory() as folder:
            return measure(size, Path(folder)) | megatron_groups(size)
    finally:
        redirection.undo()
