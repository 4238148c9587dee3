"""What kernels in Triton need of the GPU at hand."""

import torch

BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
"""The first generations of GPUs with tensor cores for bf16 and for FP8."""


def triton_unsupported_reason(device: torch.device, capability: tuple[int, int]) -> str | None:
    """What Triton's kernels lack here; None: nothing. On a CPU they run in Triton's interpreter alone, thousands of
    times slower, which tests do by themselves."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a GPU, and this run is on a CPU"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        needed, has = (".".join(map(str, c)) for c in (capability, found))
        return f"needs a GPU of compute capability {needed}; this one has {has}"
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return f"needs the package triton, which does not import ({error}): bash launch/setup.sh kernels"
    return None
