"""Which node stands out in what srun and the ranks print about a failure."""

import pytest

from parallel.watchdog import RankStatus, diagnose
from training.failed_nodes import failed_nodes

NODES = ["node1", "node2", "node3", "node4"]
KILLED = """\
srun: error: node3: task 5: Killed
srun: Terminating StepId=7.0
slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: node1: tasks 0-1: Terminated
srun: error: node2: tasks 2-3: Terminated
"""


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (KILLED, ["node3"]),
        ("srun: error: node[2,4]: tasks 2,6-7: Segmentation fault\n", ["node2", "node4"]),
        ("srun: error: node[1-4]: tasks 0-7: Killed\n", []),
        ("srun: error: node2: task 3: Exited with exit code 1\nsrun: Terminating StepId=7.0\n", []),
        ("srun: error: node2: task 99: Killed\n", []),
        ("", []),
    ],
)
def test_the_task_that_ended_first(errors: str, expected: list[str]) -> None:
    assert failed_nodes(errors, NODES, 8) == expected


def test_the_diagnosis_of_the_ranks_counts_more() -> None:
    waiting = RankStatus(7, "parallel/engine.py:1 (step)", "all_reduce over ranks 0, 1")
    failed = RankStatus(7, "parallel/engine.py:1 (step)", None, "RuntimeError: CUDA error")
    stalled = RankStatus(7, "corpus/stream.py:1 (read)", None)
    for reports, expected in (
        (dict.fromkeys(range(7), waiting), ["node4"]),
        ({rank: waiting for rank in range(8) if rank not in (2, 3, 4)}, ["node2", "node3"]),
        ({rank: failed if rank == 2 else waiting for rank in range(8)}, ["node2"]),
        ({rank: stalled if rank == 5 else waiting for rank in range(8)}, ["node3"]),
        ({rank: failed for rank in range(8) if rank}, []),  # three of them are named, and rank 0 is silent: nodes 1, 2
    ):
        said = f"switchyard: error: {diagnose(dict(reports), 8)}\n{KILLED}"
        found = failed_nodes(said, NODES, 8)
        assert found == expected or (not expected and len(found) < 4)


def test_a_single_node_never_stands_out() -> None:
    assert failed_nodes(KILLED, ["node1"], 8) == [] and failed_nodes(KILLED, [], 8) == []
