"""Attempts of a run, and the decision whether Slurm requeues it. A requeued job, or the same command given again,
continues in the same run directory. These files pass information from one attempt to the next:

    owner           the process that may write: the one that started last
    stop.json       how an attempt ended, written by its rank 0; absent if it was killed
    attempts.jsonl  of each attempt under Slurm a line when it starts, with its nodes and layout, and one when it ends

Does not import torch: the batch script uses this module."""

import contextlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from conf.override_text import setting
from training.failed_nodes import failed_nodes
from training.run_files import METRICS, json_lines, write_atomically

DONE, FAILED, BAD_CONFIGURATION, STOPPED = 0, 1, 2, 75
"""Exit codes: the run has reached its last step (or stop_after); it cannot continue; the settings are wrong; it stopped
early with a checkpoint and is to be requeued (EX_TEMPFAIL)."""

_TAIL_BYTES = 2**16  # holds several rows of metrics.jsonl
_OWNER, _STOP, _ATTEMPTS = "owner", "stop.json", "attempts.jsonl"
_FORMER_ATTEMPTS = "lives.jsonl"
"""The name of attempts.jsonl in run directories of earlier versions."""


def attempt_id(env: Mapping[str, str] = os.environ) -> str:
    """Job id and restart count, `1234.0`; empty without Slurm."""
    return f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}" if "SLURM_JOB_ID" in env else ""


def restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has restarted this job."""
    return int(env.get("SLURM_RESTART_COUNT") or 0)


class Ownership:
    """Ensures that one process writes to a run directory. A rank can outlive its job: Slurm requeues a job if a node
    does not answer, while the ranks on that node continue. The process that starts last takes the directory over; the
    earlier one notices it within seconds and before it writes a checkpoint (training.agreement), and stops writing."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the directory over from any earlier process."""
        self._path = run_dir / _OWNER
        self._token = f"{attempt_id()} {os.uname().nodename} {os.getpid()} {uuid.uuid4().hex}".strip()
        write_atomically(self._path, self._token.encode())
        (run_dir / _STOP).unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether no other process has taken the directory over since."""
        try:
            return self._path.read_bytes() == self._token.encode()
        except OSError:  # an error of the file system does not mean another process
            return True


def write_stop(run_dir: Path, *, code: int, reason: str) -> None:
    """Writes how this attempt ended. Rank 0 calls this after all ranks have ended; a rank that fails before it can join
    the others calls it by itself."""
    ended = {"attempt": attempt_id(), "code": code, "reason": reason}
    write_atomically(run_dir / _STOP, (json.dumps(ended) + "\n").encode())


def forget_stop(run_dir: Path) -> None:
    """Removes stop.json before ranks are started, so that it can only be written by them."""
    (run_dir / _STOP).unlink(missing_ok=True)


@dataclass(frozen=True)
class Attempt:
    """An attempt that has ended."""

    attempt: str
    end: str
    """done, stopped (with a checkpoint), failed (with an error), cut off (asked to stop, but killed before the
    checkpoint was written), died, or lost (with a node that Slurm has given up, and the batch script)."""
    step: int
    """The last step in metrics.jsonl."""
    checkpoint: int
    """The newest checkpoint's step, 0 for none."""
    reason: str
    failed_nodes: list[str] = field(default_factory=list)
    """The nodes on which it failed, as far as that is known."""


@dataclass(frozen=True)
class Start:
    """An attempt that has been started."""

    attempt: str
    nodes: list[str]
    """Names of the nodes of its ranks, in their order."""
    ranks: int
    layout: str
    """Layout.describe()."""
    settings: dict[str, Any]
    """Those that parallel=auto has chosen; empty without it."""


@dataclass(frozen=True)
class Verdict:
    """What the batch script does after an attempt."""

    requeue: bool
    code: int
    """The job's exit code when it is not requeued."""
    message: str
    exclude: tuple[str, ...] = ()
    """Nodes to keep the requeued job off, most failures first."""


DEATHS = 2
"""Failures of a run on one node after which the run is kept off it."""


def record_start(run_dir: Path, start: Start, down: Sequence[str] = ()) -> None:
    """Adds the line of an attempt that is about to start its ranks, and that of the previous one if it ended with a
    node, so that its batch script could not.

    Args:
        down: the nodes that Slurm has given up.
    """
    starts, ended = read_starts(run_dir), {attempt.attempt for attempt in read_attempts(run_dir)}
    before = starts[-1] if starts else None
    if before and before.attempt not in ended and (lost := [node for node in before.nodes if node in down]):
        what = before.attempt, "lost", last_step(run_dir), newest_checkpoint(run_dir)
        end = Attempt(*what, f"Slurm has given up {', '.join(lost)}", lost)
        _append(run_dir / _ATTEMPTS, json.dumps(asdict(end)))
    _append(run_dir / _ATTEMPTS, json.dumps(asdict(start)))


def record_attempt(
    run_dir: Path,
    *,
    stop_requested: bool,
    max_requeues: int | None,
    errors: str = "",
    env: Mapping[str, str] = os.environ,
) -> Verdict:
    """Adds a line to attempts.jsonl and decides whether to requeue.

    Args:
        stop_requested: whether Slurm has sent the signal that announces the end of the job.
        max_requeues: limit of requeues; None: an interactive job, which is never requeued.
        errors: what srun and the ranks have said about failed tasks (training/failed_nodes.py).
    """
    earlier = read_attempts(run_dir)
    attempt, code = _last_attempt(run_dir, stop_requested=stop_requested, env=env)
    if attempt.end == "died":
        started = next((s for s in reversed(read_starts(run_dir)) if s.attempt == attempt.attempt), None)
        found = failed_nodes(errors, started.nodes, started.ranks) if started else []
        where = f" (on {', '.join(found)})" if found else ""
        attempt = replace(attempt, failed_nodes=found, reason=attempt.reason + where)
    exclude = failing_nodes([*earlier, attempt])
    with contextlib.suppress(OSError):  # a full disk does not change the decision
        _append(run_dir / _ATTEMPTS, json.dumps(asdict(attempt)))
    what = f"after step {attempt.step}: {attempt.reason}"
    if attempt.end == "done":
        return Verdict(False, DONE, f"done {what}")
    if attempt.end == "failed":
        return Verdict(False, code, f"failed {what}")
    if max_requeues is None:
        return Verdict(
            False,
            code,
            f"{attempt.end} {what}; the same command with {setting('run.dir', str(run_dir))} continues it",
        )
    # The node may have been the cause, if it was not left out before.
    cause_removed = any(node not in failing_nodes(earlier) for node in exclude)
    if stuck(earlier, attempt) and not cause_removed:
        return Verdict(
            False,
            FAILED,
            f"{attempt.end} {what}. The previous attempt ended in the same way, without a checkpoint newer than step "
            f"{attempt.checkpoint}: not requeued. Fix the cause and submit again with the same run.dir",
        )
    if restarts(env) >= max_requeues:
        return Verdict(
            False,
            code,
            f"{attempt.end} {what}; requeued {restarts(env)} times already (slurm.max_requeues={max_requeues})",
        )
    return Verdict(True, code, f"{attempt.end} {what}; continues from step {attempt.checkpoint}", exclude)


def failing_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """The nodes on which a run has failed DEATHS times, most failures first."""
    deaths = Counter(node for attempt in attempts for node in attempt.failed_nodes)
    return tuple(node for node, count in deaths.most_common() if count >= DEATHS)


def stuck(earlier: list[Attempt], attempt: Attempt) -> bool:
    """Whether this attempt and the previous one were killed at the same step, with no new checkpoint in between."""
    if not earlier or attempt.end not in ("died", "cut off"):
        return False
    before = earlier[-1]
    same_step = before.step == attempt.step or attempt.end == "cut off"
    return before.end == attempt.end and before.checkpoint == attempt.checkpoint and same_step


def _last_attempt(run_dir: Path, *, stop_requested: bool, env: Mapping[str, str]) -> tuple[Attempt, int]:
    checkpoint, step = newest_checkpoint(run_dir), last_step(run_dir)
    stop = _read_stop(run_dir)
    name = attempt_id(env)
    if stop.get("attempt") != name:
        if stop_requested:
            reason = "asked to stop, but the checkpoint was not written in time: send the signal earlier (--signal)"
            return Attempt(name, "cut off", step, checkpoint, reason), STOPPED
        return Attempt(name, "died", step, checkpoint, "a rank died or was killed; see its output above"), FAILED
    end = {DONE: "done", STOPPED: "stopped"}.get(stop["code"], "failed")
    return Attempt(name, end, step, checkpoint, stop["reason"]), stop["code"]


def _read_stop(run_dir: Path) -> dict[str, Any]:
    """stop.json; empty if it is absent, truncated or of another format."""
    kinds = {"attempt": str, "code": int, "reason": str}
    return next((_fields(entry, kinds) for entry in json_lines(run_dir / _STOP)), None) or {}


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The attempts that have ended, oldest first. Truncated lines, lines of another format and unknown fields are
    ignored."""
    kinds = {"attempt": str, "end": str, "step": int, "checkpoint": int, "reason": str}
    entries = [*json_lines(run_dir / _FORMER_ATTEMPTS), *json_lines(run_dir / _ATTEMPTS)]
    return [
        Attempt(**found, failed_nodes=_names(entry.get("failed_nodes")))
        for entry in entries
        if (found := _fields(entry, kinds))
    ]


def read_starts(run_dir: Path) -> list[Start]:
    """The attempts that have started their ranks, oldest first; as tolerant as `read_attempts`."""
    kinds = {"attempt": str, "nodes": list, "ranks": int, "layout": str, "settings": dict}
    starts = [Start(**found) for entry in json_lines(run_dir / _ATTEMPTS) if (found := _fields(entry, kinds))]
    return [replace(start, nodes=_names(start.nodes)) for start in starts]


def describe_starts(run_dir: Path) -> tuple[str, str]:
    """How many nodes the attempts had, and their layouts: `4 nodes in attempt 1, 3 in attempt 2`, `dp4, then dp3`."""
    groups = [
        (nodes, list(numbers))
        for nodes, numbers in groupby(enumerate(read_starts(run_dir), 1), key=lambda item: len(item[1].nodes))
    ]
    parts = []
    for place, (nodes, numbered) in enumerate(groups):
        first, last = numbered[0][0], numbered[-1][0]
        unit = f" node{'' if nodes == 1 else 's'}" if place == 0 else ""
        which = f"attempt {first}" if first == last else f"attempts {first} to {last}"
        parts.append(f"{nodes}{unit} in {which}")
    layouts = [layout for layout, _ in groupby(start.layout for start in read_starts(run_dir))]
    return ", ".join(parts), ", then ".join(layouts)


def _names(value: Any) -> list[str]:
    """The texts of a list; empty for anything else."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _fields(entry: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any] | None:
    """These fields of an entry; None if one is missing."""
    entry = {"attempt": entry.get("life"), **entry}  # its name in earlier versions
    if any(type(entry.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return {name: entry[name] for name in kinds}


def _append(path: Path, line: str) -> None:
    """Appends a line to a file whose last line may be truncated."""
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint, without verifying it; 0 for none."""
    names = (re.fullmatch(r"step_(\d{8})", path.name) for path in run_dir.glob("checkpoints/step_*"))
    return max((int(name[1]) for name in names if name), default=0)


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 for none."""
    steps = (row.get("step") for row in reversed(json_lines(run_dir / METRICS, _TAIL_BYTES)))
    return next((step for step in steps if type(step) is int), 0)
