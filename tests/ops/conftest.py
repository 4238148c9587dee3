"""Kernels run on the GPU where there is one, and elsewhere in Triton's interpreter; those in C++, where the processor
lacks their instructions, on SIMDe."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where kernels run. Skips where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    if torch.cuda.is_available():
        return torch.device("cuda")
    from tests.ops import interpreter

    interpreter.install()
    return torch.device("cpu")


@pytest.fixture
def cpp_kernels() -> Iterator[None]:
    """The C++ kernels can be called, and are chosen. Skips where they cannot be compiled."""
    from tests.ops.cpp_kernels import available

    with available():
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold not-a-number until they are written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
