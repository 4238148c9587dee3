"""Compiles the operators torch.ops.switchyard once for a machine, when they are first used.

torch.utils.cpp_extension says where PyTorch's headers and libraries are. Its `load` is not used: it needs ninja, and
waits forever for a process that was killed while it compiled (docs/log.md).
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ops.operation import Unavailable
from parallel import cache_dir, file_lock

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
INSTRUCTIONS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
"""As torch names what a processor has."""
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-mfma", *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS)]


_PATIENCE = 60.0
"""Seconds without a sign of life of the process that compiles."""
_LOG = logging.getLogger("switchyard")


def missing_instructions() -> list[str]:
    has = torch.cpu.get_capabilities()
    return [name for name in INSTRUCTIONS if not has.get(name)]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def library() -> Path:
    """The shared library, compiled where the cache has none of this source, compiler, torch and C library.

    Raises:
        Unavailable: there is no compiler.
        OSError: it cannot be compiled or kept.
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
    if (found := _find(folder, key)) is not None:
        return found
    if shutil.which(compiler()[0]) is None:
        raise Unavailable("is compiled when it is first used, and there is no C++ compiler (g++, or what CXX says)")
    path = folder / f"native-{key}.lock"
    with open(path, "w") as lock, contextlib.ExitStack() as locked:
        try:  # of the ranks of a node one compiles
            locked.enter_context(file_lock.hold_lock(lock.fileno(), path, timeout=_PATIENCE))
        except file_lock.LockTimeout as error:  # the lock saves work and nothing else
            _LOG.warning("the kernels are compiled by this process too: %s", error)
        return _find(folder, key) or _make(folder, key, openmp)


def _find(folder: Path, key: str) -> Path | None:
    """The library of this key, if this user has compiled it: the name holds the hash of the content, and nobody else
    could have written the file. None: there is none, or only a damaged one (left empty by a power failure)."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        with contextlib.suppress(OSError):
            cache_dir.check_private(path, folder)
            if path.name == _name(key, path.read_bytes()):
                return path
    return None


def _name(key: str, content: bytes) -> str:
    return f"native-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _make(folder: Path, key: str, openmp: list[str]) -> Path:
    """Puts the library there, whole."""
    from torch.utils import cpp_extension  # imports setuptools, which takes longer than to load what is compiled

    include = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "native.so"

        def compile_one(source: Path) -> str:
            return _compile(made.with_name(f"{source.stem}.o"), [*include, "-c", str(source)])

        with ThreadPoolExecutor() as pool:  # at once, which takes half of the time on two processors
            objects = list(pool.map(compile_one, SOURCES))
        _compile(made, ["-shared", "-Wl,-z,defs", *objects, *openmp, *libraries])
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
