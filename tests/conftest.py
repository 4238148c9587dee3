"""Fixtures for all tests: one pool of rank processes, and one single-rank runtime in the test process."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small tests: threads cost more than they give
if "PYTEST_XDIST_WORKER" in os.environ:  # its workers have COLUMNS=80, which makes commands fold their tables
    os.environ.pop("COLUMNS", None)

import torch

# Triton decides when it is imported, which Megatron-Core does, whether its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from parallel.local_launcher import RankPool
from training.output_redirect import redirect_output


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to eight ranks, started once: `ranks.run(n, function, *args, timeout=...)`."""
    with RankPool(8) as pool:
        yield pool


@pytest.fixture(scope="session")
def runtime() -> Iterator["parallel.process_groups.Runtime"]:  # noqa: F821 (importing it costs seconds that not every test pays)
    """This process as the only rank of a world."""
    redirection = redirect_output(0)
    try:
        from parallel import megatron_compat, process_groups
        from parallel.env import World
        from parallel.layout import Layout

        yield process_groups.start(World(), Layout(1), seed=1, timeout=60, threads=1)
        process_groups.stop()
        megatron_compat.undo()
    finally:
        redirection.undo()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist (`-n N`), one worker runs all tests of a file, which share its fixtures, and one worker all
    tests of the local Slurm, of which there is one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of the local Slurm take longest and mostly wait: they begin first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))
