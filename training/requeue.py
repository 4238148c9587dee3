"""The lives of a run. A job that is requeued, or a command that is given again, goes on in the same run directory; what
passes from one life to the next is kept there:

    owner         the process that may write: the one that started last
    stop.json     how a life ended, written by its rank 0; absent when it was killed
    lives.jsonl   a line for each life under Slurm that the batch script saw end

Imports nothing heavy: the batch script asks too."""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.override_text import setting
from training.run_files import METRICS, json_lines, write_whole

DONE, FAILED, BAD_CONFIGURATION, STOPPED = 0, 1, 2, 75
"""Exit codes: the run has reached its last step (or stop_after); it cannot go on; the settings are wrong; it stopped
early with a checkpoint, please requeue (EX_TEMPFAIL)."""

_TAIL_BYTES = 2**16  # holds several rows of metrics.jsonl
_OWNER, _STOP, _LIVES = "owner", "stop.json", "lives.jsonl"


def attempt_id(env: Mapping[str, str] = os.environ) -> str:
    """Job and restart, `1234.0`; empty without Slurm."""
    return f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}" if "SLURM_JOB_ID" in env else ""


def restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has started this job again."""
    return int(env.get("SLURM_RESTART_COUNT") or 0)


class Ownership:
    """A run directory has one writer. A rank can outlive its job: Slurm gives a node up that does not answer and
    requeues the job, while on that node the ranks go on. The later process takes the directory over, the earlier one
    sees it after its step and writes no more."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the directory over."""
        self._path = run_dir / _OWNER
        self._token = f"{attempt_id()} {os.uname().nodename} {os.getpid()} {uuid.uuid4().hex}".strip()
        write_whole(self._path, self._token.encode())
        (run_dir / _STOP).unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether nobody has taken the directory over since."""
        try:
            return self._path.read_bytes() == self._token.encode()
        except OSError:  # a file system that hesitates is no other process
            return True


def write_stop(run_dir: Path, *, code: int, reason: str) -> None:
    """Says how this life ended. Rank 0 calls this once every rank has come as far; a rank that cannot even begin, and
    that the others will wait for in vain, calls it by itself."""
    ended = {"life": attempt_id(), "code": code, "reason": reason}
    write_whole(run_dir / _STOP, (json.dumps(ended) + "\n").encode())


def forget_stop(run_dir: Path) -> None:
    """Before ranks are started: what stop.json says from now on, it says of them."""
    (run_dir / _STOP).unlink(missing_ok=True)


@dataclass(frozen=True)
class Attempt:
    """A life that has ended."""

    life: str
    end: str
    """done, stopped (with a checkpoint), failed (by its own account), cut off (asked to stop, and did not get that
    far) or died."""
    step: int
    """The last step in metrics.jsonl."""
    checkpoint: int
    """The newest checkpoint's step, 0 for none."""
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the batch script does after a life."""

    requeue: bool
    code: int
    """The job's exit code when it is not requeued."""
    message: str


def record_attempt(
    run_dir: Path, *, asked: bool, max_requeues: int | None, env: Mapping[str, str] = os.environ
) -> Verdict:
    """Adds a line to lives.jsonl and decides how to go on.

    Args:
        asked: Slurm had sent the signal that announces the end of the job.
        max_requeues: None: nobody but a person starts it again.
    """
    earlier = read_attempts(run_dir)
    life, code = _ended(run_dir, asked=asked, env=env)
    with contextlib.suppress(OSError):  # a full disk: decided all the same
        _append(run_dir / _LIVES, json.dumps(asdict(life)))
    told = f"after step {life.step}: {life.reason}"
    if life.end == "done":
        return Verdict(False, DONE, f"done {told}")
    if life.end == "failed":
        return Verdict(False, code, f"failed {told}")
    if max_requeues is None:
        return Verdict(
            False,
            code,
            f"{life.end} {told}; the same command with {setting('run.dir', str(run_dir))} goes on",
        )
    if stuck(earlier, life):
        return Verdict(
            False,
            FAILED,
            f"{life.end} {told}. So did the life before, and no checkpoint is newer than step {life.checkpoint}: "
            "not requeued, since a third would do the same. Mend it and submit again with the same run.dir",
        )
    if restarts(env) >= max_requeues:
        return Verdict(
            False,
            code,
            f"{life.end} {told}; requeued {restarts(env)} times already (slurm.max_requeues={max_requeues})",
        )
    return Verdict(True, code, f"{life.end} {told}; goes on from step {life.checkpoint}")


def stuck(earlier: list[Attempt], life: Attempt) -> bool:
    """Whether this life and the one before ended against their will at the same step, with nothing kept between."""
    if not earlier or life.end not in ("died", "cut off"):
        return False
    before = earlier[-1]
    same_step = before.step == life.step or life.end == "cut off"
    return before.end == life.end and before.checkpoint == life.checkpoint and same_step


def _ended(run_dir: Path, *, asked: bool, env: Mapping[str, str]) -> tuple[Attempt, int]:
    checkpoint, step = newest_checkpoint(run_dir), last_step(run_dir)
    told = _read_stop(run_dir)
    name = attempt_id(env)
    if told.get("life") != name:
        if asked:
            reason = "asked to stop, but the checkpoint was not written in time: send the signal earlier (--signal)"
            return Attempt(name, "cut off", step, checkpoint, reason), STOPPED
        return Attempt(name, "died", step, checkpoint, "a rank died or was killed; its own words are above"), FAILED
    end = {DONE: "done", STOPPED: "stopped"}.get(told["code"], "failed")
    return Attempt(name, end, step, checkpoint, told["reason"]), told["code"]


def _read_stop(run_dir: Path) -> dict[str, Any]:
    """stop.json; empty where it is absent, torn, or says it in a way that this version does not know."""
    kinds = {"life": str, "code": int, "reason": str}
    return next((_fields(entry, kinds) for entry in json_lines(run_dir / _STOP)), None) or {}


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The lives that have ended, oldest first. Lines that are torn or of another form are passed over, and so is what
    a later version adds to a line."""
    kinds = {"life": str, "end": str, "step": int, "checkpoint": int, "reason": str}
    return [Attempt(**found) for entry in json_lines(run_dir / _LIVES) if (found := _fields(entry, kinds))]


def _fields(entry: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any] | None:
    """These fields of an entry; None where it lacks one."""
    if any(type(entry.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return {name: entry[name] for name in kinds}


def _append(path: Path, line: str) -> None:
    """Adds a line, on a new one even where the last was torn."""
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def newest_checkpoint(run_dir: Path) -> int:
    """The newest checkpoint's step, 0 for none. Its files are not looked at."""
    names = (re.fullmatch(r"step_(\d{8})", path.name) for path in run_dir.glob("checkpoints/step_*"))
    return max((int(name[1]) for name in names if name), default=0)


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 for none."""
    steps = (row.get("step") for row in reversed(json_lines(run_dir / METRICS, _TAIL_BYTES)))
    return next((step for step in steps if type(step) is int), 0)
