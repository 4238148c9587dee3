"""Stand-ins for TransformerEngine and Apex, which compute with plain PyTorch: `installed("transformer_engine")` makes
them importable under the packages' names, in this process or in a rank's.

They have the names, parameters and conventions of the packages that the project calls, no more; tests/stand_ins/
signatures.json records these of the real sources, and tests/ops/test_stand_ins.py compares. What they are not: fast,
complete, or a proof that the packages compute the same on a GPU.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = {"transformer_engine": ("transformer_engine",), "apex": ("apex", "fused_weight_gradient_mlp_cuda")}
"""By the folder below this one: the names that it makes importable."""


def folders(*packages: str) -> list[str]:
    """What PYTHONPATH is to begin with in a process that is to find the packages."""
    return [str(HERE / package) for package in packages]


@contextmanager
def installed(*packages: str) -> Iterator[None]:
    """Inside, the packages are importable. Modules of theirs that were imported are forgotten afterwards."""
    names = [name for package in packages for name in PACKAGES[package]]
    sys.path[:0] = folders(*packages)
    importlib.invalidate_caches()
    hidden = _forget(names)
    try:
        yield
    finally:
        _forget(names)
        sys.modules.update(hidden)
        for folder in folders(*packages):
            sys.path.remove(folder)


def _forget(names: list[str]) -> dict[str, object]:
    mine = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in mine}
