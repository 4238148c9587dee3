"""Sets environment variables that CUDA and PyTorch read once, at initialization. Does not import torch: the variables
must be set before that, however the process was started (a terminal, torchrun, srun)."""

import os
from collections.abc import Mapping, MutableMapping

CONNECTIONS, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"
ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the same variable; torch reads the first that is set. The last two are deprecated."""
EXPANDABLE = "expandable_segments:True"
RECORDER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Number of collectives in the buffer of torch's flight recorder; the second name is deprecated."""
RECORDER_SIZE = "2000"


def set_device_variables(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that the environment does not set.

    CUDA_DEVICE_MAX_CONNECTIONS=1: Megatron-Core relies on kernels starting in launch order, so that a matrix product
    does not start before the collective that it overlaps with. Expandable segments: the number of rows that an expert
    gets changes at every step, which fragments memory in segments of fixed size.
    """
    env.setdefault(CONNECTIONS, "1")
    if not any(name in env for name in ALLOCATOR_NAMES):
        env[ALLOCATOR] = EXPANDABLE
    if not any(name in env for name in RECORDER_NAMES):
        env[RECORDER_NAMES[0]] = RECORDER_SIZE  # read by parallel/watchdog.py when a run hangs


GPU_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")
"""Paths that exist where a GPU driver is loaded: NVIDIA (two paths), WSL, AMD."""


def may_have_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torch may find a GPU. Does not call the driver: that may initialize it, and an initialized driver cannot
    be used in forked processes."""
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not any(map(os.path.exists, GPU_DRIVERS)):
        return False
    from importlib import metadata

    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:  # built from source
        return True


def device_variables(env: Mapping[str, str] = os.environ) -> str:
    """CUDA_DEVICE_MAX_CONNECTIONS and the allocator's settings of this process, for the start table."""
    allocator = next((name for name in ALLOCATOR_NAMES if name in env), ALLOCATOR)
    return ", ".join(f"{name}={env[name]}" if name in env else f"{name} unset" for name in (CONNECTIONS, allocator))
