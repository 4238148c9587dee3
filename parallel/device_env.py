"""Environment variables that CUDA and PyTorch's allocator read once, when they start. Imports nothing heavy: they are
set before torch is imported, however the process was started (a terminal, torchrun, srun)."""

import os
from collections.abc import Mapping, MutableMapping

CONNECTIONS, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"
ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""What torch reads, the first that is set; the others are its older names."""
EXPANDABLE = "expandable_segments:True"
RECORDER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Collectives that torch's flight recorder remembers; the second is its older name."""
REMEMBERED = "2000"


def set_device_variables(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the environment leaves open.

    One connection, since Megatron-Core counts on kernels starting in the order in which they were given: the product
    that a collective overlaps with must not start before it. Segments that can grow, since the number of rows that an
    expert gets changes at every step, and blocks of a fixed size would fragment.
    """
    env.setdefault(CONNECTIONS, "1")
    if not any(name in env for name in ALLOCATOR_NAMES):
        env[ALLOCATOR] = EXPANDABLE
    if not any(name in env for name in RECORDER_NAMES):
        env[RECORDER_NAMES[0]] = REMEMBERED  # parallel/watchdog.py reads it when a run hangs


GPU_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")
"""What the drivers of GPUs leave in the file system: NVIDIA's, twice, Windows' for its Linux, and AMD's."""


def may_have_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torch may find a GPU. Asks no driver: one that was initialised, which a question can do, is unusable in
    every process that is forked afterwards."""
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not any(map(os.path.exists, GPU_DRIVERS)):
        return False
    from importlib import metadata

    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:  # built from source
        return True


def device_variables(env: Mapping[str, str] = os.environ) -> str:
    """Both as this process has them, for the start table: `NAME=value, NAME=value`."""
    allocator = next((name for name in ALLOCATOR_NAMES if name in env), ALLOCATOR)
    return ", ".join(f"{name}={env[name]}" if name in env else f"{name} unset" for name in (CONNECTIONS, allocator))
