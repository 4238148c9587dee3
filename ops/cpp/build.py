"""Kernels in C++ for a CPU with AVX512-BF16: compiled once for a machine, when they are first used, and called."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_int, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.operation import Implementation, Unavailable
from ops.run_context import RunContext
from parallel import cache_dir, file_lock

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
INSTRUCTIONS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
"""As torch names what a processor has."""
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-mfma"),
    *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS),
]


_PATIENCE = 60.0
"""Seconds without a sign of life of the process that compiles."""
_LOG = logging.getLogger("switchyard")


def missing_instructions() -> list[str]:
    has = torch.cpu.get_capabilities()
    return [name for name in INSTRUCTIONS if not has.get(name)]


def unsupported_reason() -> str | None:
    """Why the kernels cannot run here; None: they can."""
    missing = missing_instructions()
    if missing:
        return f"needs a processor with AVX512-BF16; this one lacks {', '.join(missing)}"
    if shutil.which(compiler()[0]) is None:
        return "is compiled when it is first used, and there is no C++ compiler (g++, or what CXX says)"
    return _compile_error()


@functools.cache
def _compile_error() -> str | None:
    try:
        library()
    except Exception as error:  # also where there is no home directory
        return f"cannot be compiled, kept or loaded: {error}"
    return None


def native(
    load: str, is_supported: Callable[[RunContext], bool] = lambda context: True, **declared: Any
) -> Implementation[Any]:
    """Declares what `load` names as an implementation for a processor on which only a compiler can be missing."""

    def compiled(context: RunContext) -> Any:
        if reason := unsupported_reason():
            raise Unavailable(reason)
        return Implementation("native", load).loaded(context)

    return Implementation(
        "native",
        compiled,
        device="cpu",
        dtypes=(torch.bfloat16,),
        is_supported=lambda context: not missing_instructions() and is_supported(context),
        **declared,
    )


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
    with_what = repr((compiler(), FLAGS, openmp, torch.__version__, platform.libc_ver()))
    source = b"".join(path.name.encode() + path.read_bytes() for path in [*SOURCES, *sorted(FOLDER.glob("*.h"))])
    key = hashlib.sha256(source + with_what.encode()).hexdigest()[:16]
    root = Path(cache_dir.ROOT).expanduser()
    folder = root / "kernels"
    cache_dir.make_private(folder)
    cache_dir.check_private(folder, root)
    if (found := _load(folder, key)) is not None:
        return found
    path = folder / f"native-{key}.lock"
    with open(path, "w") as lock, contextlib.ExitStack() as locked:
        try:  # of the ranks of a node one compiles
            locked.enter_context(file_lock.hold_lock(lock.fileno(), path, timeout=_PATIENCE))
        except file_lock.LockTimeout as error:  # the lock saves work and nothing else
            _LOG.warning("the kernels are compiled by this process too: %s", error)
        if (found := _load(folder, key)) is not None:
            return found
        return ctypes.CDLL(str(_make(folder, key, openmp)))


def _load(folder: Path, key: str) -> ctypes.CDLL | None:
    """The kernels of this key, if this user has compiled them: the name holds the hash of the content, and nobody else
    could have written the file. None: there are none, or only damaged ones (left empty by a power failure, or of
    another C library)."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        with contextlib.suppress(OSError):
            cache_dir.check_private(path, folder)
            if path.name == _name(key, path.read_bytes()):
                return ctypes.CDLL(str(path))
    return None


def _name(key: str, content: bytes) -> str:
    return f"native-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _make(folder: Path, key: str, openmp: list[str]) -> Path:
    """Puts the library there, whole."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "native.so"
        with ThreadPoolExecutor() as pool:  # at once, which takes half of the time on two processors
            objects = list(pool.map(lambda path: _compile(Path(own) / f"{path.stem}.o", ["-c", str(path)]), SOURCES))
        _compile(made, [*objects, *openmp])
        made.chmod(0o755)  # whatever the umask, nobody else writes it
        place = folder / _name(key, made.read_bytes())
        os.replace(made, place)
    return place


def _compile(result: Path, of: Sequence[str]) -> str:
    """The path of the result."""
    command, english = [*compiler(), *FLAGS, *of, "-o", str(result)], os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, env=english)
    if done.returncode:
        lines = done.stderr.replace(f"{FOLDER}/", "").splitlines() or [f"exit code {done.returncode}"]
        raise OSError(next((line for line in lines if "error" in line), lines[-1]))
    return str(result)


def threads() -> c_int:
    return c_int(torch.get_num_threads())


def call(function: Any, *arguments: Any) -> None:
    """Calls a kernel that packs operands, which takes memory, with these arguments and the number of threads.

    Raises:
        MemoryError: there is none.
    """
    function.restype = c_bool
    if not function(*arguments, threads()):
        raise MemoryError("no memory to pack the operands of products")


def data_of(t: Tensor | None) -> c_void_p:
    assert t is None or t.is_contiguous()
    return c_void_p(None if t is None else t.data_ptr())
