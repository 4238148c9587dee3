"""The CPU patches come and go without a trace. All of it happens in a rank process, which nobody else looks at."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from parallel import cpu
from parallel.world import World

MISSING = object()
ROOT = Path(__file__).resolve().parents[2]


def snapshot() -> dict[tuple[str, str], Any]:
    """Every attribute of the places that are patched."""
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random

    owners = {"torch": torch, "torch.cuda": torch.cuda, "random": random, "buffers": buffers, "Tensor": torch.Tensor}
    # Tensor inherits what is patched on it, so its own dictionary is not enough.
    return {(key, n): inspect.getattr_static(owner, n, MISSING) for key, owner in owners.items() for n in dir(owner)}


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    return {key for key in before.keys() | after.keys() if before.get(key, MISSING) is not after.get(key, MISSING)}


def install_and_undo(world: World) -> dict[str, Any]:
    cpu.undo()  # an earlier test of this rank may have installed them
    original = snapshot()
    first, patched = cpu.install(), snapshot()
    second, patched_again = cpu.install(), snapshot()
    told = {
        "one install": first is second and first is not None,
        "patched": changed(original, patched),
        "patched again": changed(patched, patched_again),
        "a tensor on 'cuda'": torch.zeros(1, device="cuda").device.type,
        "a tensor elsewhere": torch.zeros(1, device="meta").device.type,
    }
    cpu.undo()
    told["left behind"] = changed(original, snapshot())
    cpu.undo()
    told["left behind by a second undo"] = changed(original, snapshot())
    return told


def test_undo_restores_every_attribute(ranks):
    (told,) = ranks.run(1, install_and_undo, timeout=30)
    assert told["one install"] and told["patched again"] == set()
    # A few that a reader expects, and of each owner one.
    assert told["patched"] >= {
        ("torch", "empty"),
        ("torch.cuda", "Stream"),
        ("Tensor", "record_stream"),
        ("random", "_get_cuda_rng_state"),
        ("buffers", "dist_reduce_scatter_func"),
    }
    assert told["left behind"] == told["left behind by a second undo"] == set()
    assert (told["a tensor on 'cuda'"], told["a tensor elsewhere"]) == ("cpu", "meta")


def install_with_cuda(world: World) -> tuple[Any, set[tuple[str, str]], str]:
    cpu.undo()
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        before = snapshot()
        installed = cpu.install()
        with cpu.tensor_types_as_cuda():
            name = torch.zeros(1).type()
        return installed, changed(before, snapshot()), name
    finally:
        torch.cuda.is_available = available


def test_with_cuda_nothing_is_patched(ranks):
    assert ranks.run(1, install_with_cuda, timeout=30) == [(None, set(), "torch.FloatTensor")]


def type_names(world: World) -> list[str]:
    one = torch.ones(1, dtype=torch.bfloat16)
    original = inspect.getattr_static(torch.Tensor, "type")
    told = [one.type()]
    try:
        with cpu.tensor_types_as_cuda():
            told += [one.type(), str(one.type(torch.float64).dtype)]
            raise InterruptedError
    except InterruptedError:
        pass
    assert inspect.getattr_static(torch.Tensor, "type") is original
    return [*told, one.type()]


def test_type_names_change_only_inside(ranks):
    wanted = ["torch.BFloat16Tensor", "torch.cuda.BFloat16Tensor", "torch.float64", "torch.BFloat16Tensor"]
    assert ranks.run(1, type_names, timeout=30) == [wanted]


def test_the_engine_is_imported_without_torchs_compiler():
    """Half of the import's time, and of every command's way to its first step."""
    script = "import torch; c = torch.compile; from parallel import cpu; cpu.megatron(); import sys; "
    script += "print('torch._dynamo' in sys.modules, 'megatron.core' in sys.modules, torch.compile is c)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True", "True"]


def test_nothing_before_the_fork_initialises_the_driver():
    """What the fork servers of runs and tests preload, with a torch that was built with CUDA and a driver that notices
    every call. A rank that is forked from a process whose driver is initialised fails at its first CUDA call."""
    script = """
import sys, torch
from torch import cuda
called = []
torch._C._cuda_getDeviceCount = lambda: called.append("cudaGetDeviceCount") or 1
for name in ("_cuda_init", "_cuda_getDevice", "_cuda_setDevice"):
    setattr(torch._C, name, lambda *a, name=name: called.append(name))
cuda._is_compiled = lambda: True
cuda._lazy_init = lambda: called.append("_lazy_init")
cuda._device_count_nvml = lambda: -1  # a container without the management library: no way round the driver
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
assert "megatron.core" in sys.modules
print(called)
assert torch.cuda.is_available() and called  # the stand-in works
"""
    from parallel.simulate import RankPool
    from training import rank

    default = inspect.signature(RankPool.__init__).parameters["preload"].default
    command = [sys.executable, "-W", "ignore", "-c", script, *default, *rank.PRELOAD]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]"]
