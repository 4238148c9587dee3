"""The packages import each other in one direction, no module imports itself through others, and files stay short."""

import ast
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "conf": set(),
    "parallel": {"conf"},
    "ops": {"parallel", "conf"},
    "moe": {"ops", "parallel", "conf"},
    "models": {"moe", "ops", "parallel", "conf"},
    "corpus": {"parallel", "conf"},
    "training": {"corpus", "models", "moe", "ops", "parallel", "conf"},
    "launch": {"training", "corpus", "models", "moe", "ops", "parallel", "conf"},
    "benchmarks": {"training", "corpus", "models", "moe", "ops", "parallel", "conf"},
}
"""What each package may import of the others."""
LINES = 400
"""Of a Python file, at most."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, *, when_imported: bool) -> set[str]:
    """The modules of ours that a file imports: all, or those that are imported together with it."""
    tree = ast.parse(path.read_text())
    todo, found = list(tree.body), set()
    while todo:
        node = todo.pop()
        if when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if when_imported and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        todo += list(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & set(modules())


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, path in modules().items()
        for other in imports(path, when_imported=False)
        if module.split(".")[0] == package and other.split(".")[0] not in ALLOWED[package] | {package}
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    edges = {module: imports(path, when_imported=True) for module, path in modules().items()}
    state: dict[str, str] = defaultdict(str)

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state[module] != "open", " -> ".join([*path[path.index(module) :], module])
        if not state[module]:
            state[module] = "open"
            for other in sorted(edges[module] - {module}):
                visit(other, (*path, module))
            state[module] = "done"

    for module in edges:
        visit(module, ())


def test_files_stay_short() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > LINES}
    assert not long


def test_nothing_large_is_tracked() -> None:
    """Sources and small pictures only: a downloaded package would stay in every clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert sizes and not {name: size for name, size in sizes.items() if size > 200 * 2**10}
