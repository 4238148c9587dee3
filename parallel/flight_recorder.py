"""Reads torch's flight recorder: which collectives this rank has launched, and which of them are pending.

NCCL collectives return immediately, and those of the backward pass are launched by autograd's thread, so that a stack
trace does not show which collective a rank waits for. Imports torch only when it is called.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.torch_private import flight_recorder_dump, ranks_of_groups


@dataclass(frozen=True)
class Pending:
    """A collective that was launched and has not completed."""

    group: str
    """Name of its process group, the same on every rank."""
    sequence: int
    """Sequence number in that group, from 1."""
    name: str
    """torch's name of it: nccl:all_reduce."""
    ranks: list[int] = field(default_factory=list)
    """The ranks of the group; empty: unknown."""

    def __str__(self) -> str:
        of = f" over {format_ranks(self.ranks)}" if self.ranks else f" over process group {self.group}"
        return f"{self.name.rpartition(':')[2]} number {self.sequence}{of}"


@dataclass(frozen=True)
class Trace:
    """The state of a rank's collectives."""

    launched: dict[str, int]
    """Process group -> number of collectives launched so far."""
    pending: Pending | None
    """The oldest pending collective; None: there is none."""


def format_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 1 and more`."""
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def read_trace(dump: Mapping[str, Any], group_ranks: Mapping[str, list[int]]) -> Trace | None:
    """Parses a dump of the flight recorder; None if it is empty because the recorder is off.

    Args:
        dump: `version`, `entries` and `pg_status`, as torch writes them.
        group_ranks: name of each process group -> its ranks.
    """
    entries = [entry for entry in dump.get("entries", []) if not entry.get("is_p2p")]
    if not entries:
        return None
    launched: dict[str, int] = {}
    for entry in entries:
        name = entry["process_group"][0]
        launched[name] = max(launched.get(name, 0), entry["collective_seq_id"])
    open_ones = [entry for entry in entries if not entry.get("retired") and entry.get("state") != "completed"]
    oldest = min(open_ones, key=lambda entry: entry["record_id"], default=None)
    if oldest is None:
        return Trace(launched, None)
    group = oldest["process_group"][0]
    return Trace(
        launched,
        Pending(group, oldest["collective_seq_id"], oldest["profiling_name"], list(group_ranks.get(group, []))),
    )


def trace() -> Trace | None:
    """The current state of this rank's collectives; None if the recorder is unavailable or off."""
    calls = flight_recorder_dump()
    return None if calls is None else read_trace(json.loads(calls), ranks_of_groups())


def missing_from(pending: Pending, launched: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks of its group that have not launched a pending collective.

    Args:
        launched: for every rank that has reported, its number of launched collectives by process group.
    """
    ranks = pending.ranks or sorted(launched)
    return [rank for rank in ranks if rank in launched and launched[rank].get(pending.group, 0) < pending.sequence]
