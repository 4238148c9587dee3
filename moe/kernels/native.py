"""The experts' products on a CPU with AVX512-BF16 (moe/kernels/native.cpp), as a set of tools.

oneDNN, which multiplies bf16 for torch on a CPU, compiles a kernel for every shape. These are compiled once for a
machine, take any number of rows, read them from where they lie, and add a weight's gradient to Megatron-Core's fp32
buffer.

Legend: T tokens, R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden,
G 2 for gated activations, else 1.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.kernels.tools import Weight, main_gradient

SOURCE = Path(__file__).with_suffix(".cpp")
INSTRUCTIONS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
"""As torch names what a processor has."""
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-mfma"]
FLAGS += [f"-m{name.replace('_', '')}" for name in INSTRUCTIONS]
KINDS = ("swiglu", "geglu", "gelu", "relu", "relu2")
"""In the order of native.cpp."""


def missing_instructions() -> list[str]:
    has = torch.cpu.get_capabilities()
    return [name for name in INSTRUCTIONS if not has.get(name)]


def obstacle() -> str | None:
    """Why the kernels cannot run here, before anything is compiled; None: they can."""
    missing = missing_instructions()
    if missing:
        return f"needs a processor with AVX512-BF16; this one lacks {', '.join(missing)}"
    if shutil.which(compiler()[0]) is None:
        return "is compiled when it is first used, and there is no C++ compiler (g++, or what CXX says)"
    return None


def slower_than_onednn() -> bool:
    """Whether torch's products have matrix instructions that these lack."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled where the cache has none of this source, compiler, torch and C library.

    Raises:
        OSError: they cannot be compiled, kept or loaded.
    """
    # torch's own OpenMP, where it comes with one, so that both share a pool of threads.
    openmp = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]
    command = [*compiler(), *FLAGS, str(SOURCE), *openmp]
    with_what = repr((command, torch.__version__, platform.libc_ver()))
    name = hashlib.sha256(SOURCE.read_bytes() + with_what.encode()).hexdigest()[:16]
    place = Path("~/.cache/switchyard/kernels").expanduser() / f"native-{name}.so"
    if place.exists():
        try:
            return ctypes.CDLL(str(place))
        except OSError:  # left empty by a power failure, or of another C library
            place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as own:
        made = Path(own) / place.name
        _compile([*command, "-o", str(made)])
        # Put there whole, and never over one that another process put there and may be running.
        with contextlib.suppress(FileExistsError):
            os.link(made, place)
        return ctypes.CDLL(str(place))


def _compile(command: list[str]) -> None:
    english = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, env=english)
    if done.returncode:
        lines = done.stderr.replace(str(SOURCE), SOURCE.name).splitlines() or [f"exit code {done.returncode}"]
        raise OSError(next((line for line in lines if "error" in line), lines[-1]))


def _threads() -> c_int:
    return c_int(torch.get_num_threads())


def _multiply(function: Any, *arguments: Any) -> None:
    function.restype = c_bool
    if not function(*arguments, _threads()):
        raise MemoryError("no memory to pack the operands of the experts' products")


def _pointer(t: Tensor | None) -> c_void_p:
    assert t is None or t.is_contiguous()
    return c_void_p(None if t is None else t.data_ptr())


def _dense(t: Tensor) -> Tensor:
    """Its values side by side in memory."""
    assert t.dtype == torch.bfloat16
    return t.contiguous()


def _numbers(row_R: Tensor | None) -> Tensor | None:
    assert row_R is None or row_R.dtype == torch.int64
    return None if row_R is None else row_R.contiguous()


def _dense_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else _dense(t)


@dataclass(frozen=True)
class Rows:
    """x [R, K], or of x [T, K] the rows row_R."""

    x_RK: Tensor
    row_R: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_RK if self.row_R is None else self.row_R)


class NativeTools:
    """bf16, added up in fp32."""

    def groups(self, counts: list[int], device: torch.device) -> Tensor:
        """int64 [L + 1]: where each expert's rows begin, and where the last one's end."""
        return torch.tensor([0, *counts]).cumsum(0)

    def weight(self, w_LKN: Tensor) -> Weight:
        transposed = w_LKN.stride(2) != 1 and w_LKN.stride(1) == 1
        dense_LKN = _dense(w_LKN.transpose(1, 2)).transpose(1, 2) if transposed else _dense(w_LKN)
        return Weight(dense_LKN, dense_LKN.transpose(1, 2))

    def rows(self, x_RK: Tensor, row_R: Tensor | None = None) -> Rows:
        return Rows(_dense(x_RK), _numbers(row_R))

    def product(self, x_RK: Rows, w_LKN: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
        experts, inner, outer = w_LKN.shape
        assert dtype == torch.bfloat16 and x_RK.x_RK.shape[1] == inner and int(groups[-1]) == len(x_RK)
        transposed = not w_LKN.is_contiguous()
        y_RN = x_RK.x_RK.new_empty((len(x_RK), outer))
        _multiply(
            library().switchyard_product,
            c_int64(experts), _pointer(groups), _pointer(x_RK.x_RK), _pointer(x_RK.row_R),
            _pointer(w_LKN.transpose(1, 2) if transposed else w_LKN), c_bool(transposed),
            c_int64(inner), c_int64(outer), _pointer(y_RN),
        )  # fmt: skip
        return y_RN

    def activate(self, h_RGF: Tensor, name: str, keep_RF: Tensor | None = None) -> Rows:
        h_RGF, keep_RF = _dense(h_RGF), _dense_or_none(keep_RF)
        rows, _, width = h_RGF.shape
        a_RF = h_RGF.new_empty((rows, width))
        library().switchyard_activate(
            c_int(KINDS.index(name)), c_int64(rows), c_int64(width),
            _pointer(h_RGF), _pointer(keep_RF), _pointer(a_RF), _threads(),
        )  # fmt: skip
        return Rows(a_RF)

    def activate_back(
        self, h_RGF: Tensor, da_RF: Tensor, name: str, keep_RF: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Rows]:
        h_RGF, da_RF, keep_RF = _dense(h_RGF), _dense(da_RF), _dense_or_none(keep_RF)
        rows, _, width = h_RGF.shape
        a_RF, dh_RN = da_RF, torch.empty_like(h_RGF).flatten(1)  # a value of da is read before it is written
        library().switchyard_activate_back(
            c_int(KINDS.index(name)), c_int64(rows), c_int64(width),
            _pointer(h_RGF), _pointer(da_RF), _pointer(keep_RF), _pointer(a_RF), _pointer(dh_RN),
            _threads(),
        )  # fmt: skip
        return a_RF, dh_RN, Rows(dh_RN)

    def columns(self, x_RK: Tensor, groups: Tensor, row_R: Tensor | None = None) -> tuple[Tensor, ...]:
        return (_dense(x_RK),) if row_R is None else (_dense(x_RK), _numbers(row_R))

    def weight_gradient(self, x_RK: tuple[Tensor, ...], dy_RN: tuple[Tensor, ...], groups: Tensor, w: Tensor) -> Tensor:
        (x_RK, *row_R), (dy_RN,) = x_RK, dy_RN
        main = main_gradient(w)
        assert int(groups[-1]) == len(dy_RN) and (main is None or main.dtype == torch.float32)
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
        _multiply(
            library().switchyard_weight_gradient,
            c_int64(len(groups) - 1), _pointer(groups), _pointer(x_RK), _pointer(row_R[0] if row_R else None),
            _pointer(dy_RN), c_int64(x_RK.shape[1]), c_int64(dy_RN.shape[1]),
            _pointer(dw if main is None else main), c_bool(main is not None),
        )  # fmt: skip
        return dw
