"""The C++ kernels on any x86 processor: one without AVX512-BF16 runs the same sources on SIMDe (simde.h)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ops.cpp import build, operators

_HEADER = Path(__file__).with_name("simde.h")
_DIGEST = hashlib.sha256(_HEADER.read_bytes()).hexdigest()[:16]
_FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-Wno-psabi"),
    *("-include", str(_HEADER), f"-DSIMDE_FOR_TESTS={_DIGEST}"),
]


def _simde_missing() -> str | None:
    has = torch.cpu.get_capabilities()
    if not (has.get("avx2") and has.get("fma3")):
        return "and no AVX2, on which SIMDe could run them"
    if not any(Path(folder, "simde/x86/avx512.h").is_file() for folder in ("/usr/include", "/usr/local/include")):
        return "and SIMDe, which would do without, is not installed (Debian: libsimde-dev)"
    return None


@contextmanager
def available() -> Iterator[None]:
    """Context manager in which the kernels are compiled for this processor and chosen as on one that has AVX512-BF16.
    Skips the test where they cannot be."""
    with pytest.MonkeyPatch.context() as patched:
        if missing := build.missing_instructions():
            if reason := _simde_missing():
                pytest.skip(f"no {', '.join(missing)} here, {reason}")
            patched.setattr(build, "FLAGS", _FLAGS)
            patched.setattr(build, "INSTRUCTIONS", ())
        operators._load_error.cache_clear()
        if reason := operators.unsupported_reason():
            pytest.skip(f"the kernel {reason}")
        yield
    operators._load_error.cache_clear()
