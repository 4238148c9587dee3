"""How the C++ kernels are compiled, kept and chosen for the experts, and what is said where they cannot be."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conf.schema import MoeConfig, ParallelConfig
from ops import registry
from ops.cpp import build, operators
from ops.cpp.experts import NativeGemmBackend, Operand
from ops.experts import EXPERTS
from ops.operation import Row, Unavailable
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, selected, tiny, try_on
from tests.ops.cpp_kernels import available
from tests.parallel.helpers import started
from tests.test_structure import imports, modules

ROOT = Path(__file__).parent.parent.parent
here = pytest.mark.usefixtures("cpp_kernels")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Why the kernels cannot be loaded is not remembered, before or after."""
    operators._load_error.cache_clear()
    yield monkeypatch
    operators._load_error.cache_clear()


def backend_row(
    runtime: Runtime, wanted: str = "auto", dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Row:
    model = tiny(MoeConfig(num_experts=4, backend=wanted))
    return selected(EXPERTS, run_context(model, runtime, dtype, torch.device(device)))[1]


@here
@pytest.mark.parametrize(("matrix_instructions", "backend"), [(False, "native"), (True, "fused")])
def test_they_are_the_rule_where_torch_has_no_matrix_instructions(
    matrix_instructions: bool, backend: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = torch.cpu.get_capabilities() | {"amx_bf16": matrix_instructions}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert backend_row(runtime).name == backend
    assert backend_row(runtime, dtype=torch.float32).name == "fused"


def test_who_asks_for_them_hears_what_is_missing(runtime: Runtime, untried: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend=native computes in bf16, this run in torch.float32\. Use"):
        backend_row(runtime, "native", torch.float32)
    with pytest.raises(ValueError, match="backend=native is for a CPU"):
        try_on(runtime.device, EXPERTS, untried)
        backend_row(runtime, "native", device="cuda")
    has = dict.fromkeys(build.INSTRUCTIONS, True)
    untried.setattr(torch.cpu, "get_capabilities", lambda: has | {"avx512_bf16": False})
    with pytest.raises(ValueError, match=r"AVX512-BF16; this one lacks avx512_bf16\. Use model.moe.backend=auto"):
        backend_row(runtime, "native")
    untried.setattr(torch.cpu, "get_capabilities", lambda: has)
    untried.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler \(g\+\+, or what CXX says\)"):
        backend_row(runtime, "native")


@here
def test_a_compiler_that_fails_and_kernels_that_differ_are_told(
    runtime: Runtime, untried: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with untried.context() as patched:
        patched.setenv("HOME", str(tmp_path))
        patched.setattr(build, "FLAGS", [*build.FLAGS, "-mno-such-instructions"])
        with pytest.raises(ValueError, match=r"cannot be compiled, kept or loaded: .*error: unrecognized"):
            backend_row(runtime, "native")
        row = backend_row(runtime)
        assert row.name == "fused" and "; native cannot be compiled" in row.why and row.refused
        assert {path.suffix for path in (tmp_path / ".cache/switchyard/kernels").iterdir()} == {".lock"}
    operators._load_error.cache_clear()
    right = NativeGemmBackend.activate
    untried.setattr(NativeGemmBackend, "activate", lambda *a: Operand(right(*a).x_RK * 1.05))
    with pytest.raises(ValueError, match=r"backend=native differs from the reference by \d"):
        backend_row(runtime, "native")
    row = backend_row(runtime)
    assert row.name == "fused" and "; native differs from the reference by" in row.why and row.refused


@here
def test_a_cache_that_cannot_be_written_is_told(runtime: Runtime, untried: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    untried.setenv("HOME", str(tmp_path))
    row = backend_row(runtime)
    assert row.name == "fused" and "; native cannot be compiled, kept or loaded: " in row.why and row.refused


@here
def test_who_asked_for_nothing_reads_why_they_are_left_out(runtime: Runtime, untried: pytest.MonkeyPatch) -> None:
    assert "native" not in backend_row(runtime, dtype=torch.float32).why
    untried.setenv("CXX", "no-such-compiler -pipe")
    row = backend_row(runtime)
    assert row.name == "fused" and row.refused
    assert "; native is compiled when it is first used, and there is no C++ compiler (g++, or what CXX says)" in row.why
    untried.setattr(build, "missing_instructions", lambda: ["avx512_bf16"])
    row = backend_row(runtime)
    assert "native" not in row.why and not row.refused


def backend_on_rank(world: World, lacking: int) -> tuple[str, str, bool]:
    """Of two ranks, one has no compiler (rank function)."""
    with available(), pytest.MonkeyPatch.context() as patched, started(world, ParallelConfig()) as runtime:
        if world.rank == lacking:
            patched.setattr(operators, "unsupported_reason", lambda: "is compiled when it is first used")
        row = backend_row(runtime)
        return row.name, row.why, row.refused


@here
def test_they_run_on_every_node_or_on_none(ranks: RankPool) -> None:
    (name, why, refused), other = ranks.run(2, backend_on_rank, 1, timeout=120)
    assert name == other[0] == "fused" and refused and why.endswith("; native cannot run on every node")


def small_library(folder: Path, monkeypatch: pytest.MonkeyPatch, commands: list[object]) -> Callable[[], Path]:
    """What compiles a library of one function in a home of its own, and notes each call of the compiler."""
    source, run = folder / "one.cpp", subprocess.run
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (commands.append(a), run(*a, **k))[1])
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setattr(build, "FLAGS", ["-fPIC"])
    monkeypatch.setenv("HOME", str(folder))
    return build.library


def test_they_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[object] = []
    library = small_library(tmp_path, monkeypatch, commands)
    made = library()
    assert library() == made and len(commands) == 2  # one source, and the linker
    monkeypatch.setenv("CXX", "g++ -O1")
    assert library() != made and len(commands) == 4
    monkeypatch.setenv("CXX", "g++")
    made.write_bytes(b"")  # as a power failure leaves it
    assert library() == made and len(commands) == 6 and ctypes.CDLL(str(made)).one() == 1


def test_what_was_compiled_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a node that shares a home directory with one that has a compiler."""
    library = small_library(tmp_path, monkeypatch, [])
    made = library()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library() == made
    made.unlink()
    with pytest.raises(Unavailable, match=r"there is no C\+\+ compiler"):
        library()


def test_of_processes_that_start_together_one_compiles(tmp_path: Path) -> None:
    counting, source = tmp_path / "counting", tmp_path / "one.cpp"
    counting.write_text(f'#!/bin/sh\necho >> "{tmp_path}/calls"\nexec g++ "$@"\n')
    counting.chmod(0o755)
    source.write_text("int one() { return 1; }\n")
    program = (
        "import sys; from pathlib import Path; from ops.cpp import build; "
        "build.SOURCES, build.FLAGS = [Path(sys.argv[1])], ['-fPIC']; build.library()"
    )
    env = os.environ | {"HOME": str(tmp_path), "CXX": str(counting)}
    started = [subprocess.Popen([sys.executable, "-c", program, str(source)], env=env, cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_their_folder_can_be_deleted(tmp_path: Path) -> None:
    """Only the registry imports it, and does without it."""
    inside = {name for name in modules() if name.startswith("ops.cpp")}
    users = {
        name for name, path in modules().items() if name not in inside and imports(path, when_imported=False) & inside
    }
    assert users == {"ops.registry"}
    for package in ("conf", "parallel", "ops"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("cpp", "__pycache__"))
    program = "from ops import registry; assert registry.CPP_KERNELS == {}, registry.CPP_KERNELS"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_who_asks_for_kernels_that_were_deleted_hears_it(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CPP_KERNELS", {})
    with pytest.raises(ValueError, match=r"backend=native needs the folder ops/cpp, .*Use model.moe.backend=auto"):
        backend_row(runtime, "native")
    assert backend_row(runtime).name == "fused"
