"""What torch's flight recorder knows of this rank's collectives: which ones it has launched, and which of them are not
over. A collective of NCCL returns at once, and one of the backward pass is launched by autograd's own thread, so that
a stack does not show what a rank waits for. Imports torch only where it is asked."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.torch_private import flight_recorder_dump, ranks_of_groups


@dataclass(frozen=True)
class Pending:
    """A collective that was launched and is not over."""

    group: str
    """Its process group's name, the same on every rank."""
    sequence: int
    """Which collective of that group it is, counted from 1 on every rank."""
    name: str
    """As torch calls it: nccl:all_reduce."""
    ranks: list[int] = field(default_factory=list)
    """Of the group; empty: not known."""

    def __str__(self) -> str:
        of = f" over {format_ranks(self.ranks)}" if self.ranks else f" over process group {self.group}"
        return f"{self.name.rpartition(':')[2]} number {self.sequence}{of}"


@dataclass(frozen=True)
class Trace:
    """A rank's record."""

    launched: dict[str, int]
    """Collectives launched in each process group so far."""
    pending: Pending | None
    """The oldest that is not over; None: none is."""


def format_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 1 and more`."""
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def read_trace(dump: Mapping[str, Any], group_ranks: Mapping[str, list[int]]) -> Trace | None:
    """Of torch's own dump; None where it holds nothing: the recorder is off.

    Args:
        dump: `version`, `entries` and `pg_status`, as torch writes them.
        group_ranks: the ranks of every process group by its name.
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
    """Of this rank, now; None where torch has no record."""
    calls = flight_recorder_dump()
    return None if calls is None else read_trace(json.loads(calls), ranks_of_groups())


def missing_from(pending: Pending, launched: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks of its group that have not launched it, and that the others wait for.

    Args:
        launched: of every rank that told, its counts by process group.
    """
    ranks = pending.ranks or sorted(launched)
    return [rank for rank in ranks if rank in launched and launched[rank].get(pending.group, 0) < pending.sequence]
