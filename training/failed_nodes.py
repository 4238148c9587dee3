"""On which nodes an attempt has failed, from what srun and the ranks print about it. Does not import torch: the batch
script uses this module.

    switchyard: error: the job ends: rank 2 does not respond (dead or frozen); rank 0 ...    parallel/watchdog.py
    srun: error: node3: task 2: Killed                                                       the first to end
    srun: launch/slurm: _step_signal: Terminating StepId=7.0                                 --kill-on-bad-exit
    srun: error: node[1-2,4]: tasks 0-1,3: Terminated                                        because of it

The ranks' diagnosis counts before the order in which tasks ended. Tasks that exit with a code have raised an exception,
which says nothing about the node unless the diagnosis names the rank. If every node failed, none of them stands out.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

_DIAGNOSIS = "the job ends: "
_BLAMED = re.compile(r"ranks? ([\d, ]*\d)(?: and more)? (?:do(?:es)? not respond|failed in|stalled in)")
_TASKS = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): (?!Exited with exit code)")
_BECAUSE_OF_IT = re.compile(r"srun: .*(Terminating StepId|Job step aborted)|srun: error: \S+: tasks? \S+: Terminated")


def failed_nodes(errors: str, nodes: Sequence[str], ranks: int) -> list[str]:
    """The nodes that stand out as the cause of a failure; empty if none does.

    Args:
        errors: lines of the job's standard error.
        nodes: of the ranks, which are distributed over them in blocks.
    """
    if not nodes:
        return []
    lines = errors.splitlines()
    blamed = next((list(_blamed(line)) for line in lines if _DIAGNOSIS in line), [])
    if not blamed:
        first = itertools.takewhile(lambda line: not _BECAUSE_OF_IT.match(line), lines)
        blamed = [task for line in first if (found := _TASKS.match(line)) for task in _numbers(found[1])]
    per_node = -(-ranks // len(nodes))
    where = {rank // per_node for rank in blamed if rank < ranks}
    return [node for index, node in enumerate(nodes) if index in where] if len(where) < len(nodes) else []


def _blamed(line: str) -> Iterator[int]:
    """The ranks that a diagnosis names as failed, not those that wait for them."""
    for found in _BLAMED.finditer(line):
        yield from map(int, re.findall(r"\d+", found[1]))


def _numbers(text: str) -> Iterator[int]:
    """`0-1,3` -> 0, 1, 3."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
