"""Versions, and what this card can do at best: a large product, a copy, a launch, and which kernel attends."""

import platform
import subprocess
import sys

import torch
import torch.nn.functional as F

from tests.gpu.stages.common import DEVICE, REHEARSE, attempt, bf16, emit, seconds


def versions() -> dict[str, object]:
    def version(package: str) -> str | None:
        import importlib.metadata

        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "megatron-core", "hydra-core", "transformers", "numpy")
    found: dict[str, object] = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(driver, capture_output=True, text=True, timeout=20).stdout.strip()
    else:
        found["device"] = platform.processor() or "CPU"
    return found


def product() -> dict[str, float]:
    size = 64 if REHEARSE else 8192
    a, b = bf16(size, size, seed=1), bf16(size, size, seed=2)
    took = seconds({"product": lambda: a @ b})["product"]
    return {"size": size, "tflops": 2 * size**3 / took / 1e12}


def copy() -> dict[str, float]:
    count = 2**16 if REHEARSE else 2**31
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    took = seconds({"copy": lambda: target.copy_(source)})["copy"]
    return {"bytes": 2 * count, "gb_per_s": 2 * count / took / 1e9}


def launches() -> dict[str, float]:
    one, times = torch.zeros(1, device=DEVICE), 20 if REHEARSE else 1000

    def many() -> None:
        for _ in range(times):
            one.add_(1)

    return {"microseconds": seconds({"launches": many}, repetitions=5)["launches"] / times * 1e6}


def attention_kernel(name: str) -> dict[str, object]:
    """The kernels that torch's attention and ours launch, by the profiler."""
    from ops.attention_pieces import Piece, Segment
    from ops.varlen_attention import joined_attention, varlen_attention

    sequence, heads, groups = (64, 4, 2) if REHEARSE else (4096, 32, 8)
    q = bf16(1, heads, sequence, 128, seed=1)
    k, v = (bf16(1, heads if name == "causal" else groups, sequence, 128, seed=s) for s in (2, 3))
    half = sequence // 2
    mask = torch.ones(sequence, sequence, dtype=torch.bool, device=DEVICE).tril()
    documents = [Piece(slice(0, sequence), [[Segment(half, 0, half), Segment(half, half, sequence)]])]
    gqa = name != "causal"
    run = {
        "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "grouped": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa),
        "documents, joined": lambda: joined_attention(q, k, v, documents),
        "documents, varlen": lambda: varlen_attention(q, k, v, documents),
    }[name]
    took = seconds({name: run}, repetitions=5)[name]
    with torch.profiler.profile() as profile:
        run()
    events = profile.key_averages()
    on_device = sorted(events, key=lambda e: getattr(e, "self_device_time_total", 0), reverse=True)
    return {"milliseconds": took * 1e3, "kernels": [event.key[:120] for event in on_device[:3]]}


def main() -> None:
    emit("versions", **versions())
    attempt("product", product)
    attempt("copy", copy)
    attempt("launch", launches)
    for name in ("causal", "grouped", "masked", "documents, joined", "documents, varlen"):
        attempt(f"attention, {name}", lambda name=name: attention_kernel(name))


if __name__ == "__main__":
    main()
