"""A watchdog that ends all ranks of a job when one of them stalls, dies or fails.

A thread on every rank monitors the progress of training and the rendezvous store, which one rank of each node asks for
all of its node (parallel/node_watch.py). The rank that first detects a failure, which is an exception or a lack of
progress, announces it in the store. All ranks then log their stack traces, report what they were doing and end. The
message names the failed rank, its step and the collective that the others wait for. That collective is read from the
stack trace; under NCCL, whose calls return immediately, from torch's flight recorder (parallel/flight_recorder.py).
"""

import contextlib
import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from conf.printable import visible
from parallel import flight_recorder, local_launcher, rendezvous
from parallel.env import World, should_print
from parallel.flight_recorder import Pending, Trace, format_ranks, missing_from
from parallel.node_watch import NodeWatch
from parallel.rendezvous import StoreTimeout, TimeoutStore
from parallel.torch_private import default_store

T = TypeVar("T")
FAILED = 1
"""Exit code of a rank that the watchdog ends."""
_REQUESTS = 4096
"""Requests per second that the store gets at most, when all ranks wait for a diagnosis."""
_KEYS = 64
"""Reports that are read from the store at once."""
_ROOT = Path(__file__).resolve().parent.parent
_LOG = logging.getLogger("switchyard")
# What is waited for outside of torch.distributed, by the file of the innermost frame.
_WAITS = {
    "p2p_communication.py": "point-to-point communication between pipeline stages",
    "param_and_grad_buffer.py": "the reduction of gradients or the all-gather of weights",
    "process_groups.py": "the first message",
}


@dataclass(frozen=True)
class RankStatus:
    """What a rank was doing when the failure was announced."""

    step: int
    at: str
    """File, line and function of the innermost frame of this project."""
    collective: str | None
    """The collective that it waits for and the ranks that take part; None: it waits for none."""
    error: str | None = None
    """The exception that it failed with."""
    pending: Pending | None = None
    """The pending collective according to the flight recorder; None: there is none, or no recorder."""
    launched: dict[str, int] = field(default_factory=dict)
    """Process group -> number of launched collectives; empty without a recorder."""

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankStatus":
        values = json.loads(text)
        values["pending"] = values["pending"] and Pending(**values["pending"])
        return cls(**values)

    def __str__(self) -> str:
        inside = f" in {self.collective}" if self.collective else ""
        return f"step {self.step}{inside}, at {self.at}"


def rank_status(
    step: int, frames: list[FrameType], error: BaseException | None = None, trace: Trace | None = None
) -> RankStatus:
    """Args:
    frames: a thread's stack, innermost first.
    trace: from the flight recorder; None: the collective is read from the stack.
    """
    pending, launched = (trace.pending, trace.launched) if trace else (None, {})
    collective = (pending and str(pending)) if trace else _collective(frames)
    ours = next((f for f in frames if _is_ours(f)), frames[0])
    at = f"{_short(ours.f_code.co_filename)}:{ours.f_lineno} ({ours.f_code.co_name})"
    message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return RankStatus(step, at, collective, message if error else None, pending, launched)


def _collective(frames: list[FrameType]) -> str | None:
    """The collective that a stack, innermost first, waits for: the outermost function of torch.distributed among the
    innermost frames, or a wait in one of _WAITS."""
    inside = list(itertools.takewhile(_is_torchs, frames))
    public = [frame.f_code.co_name for frame in inside if not frame.f_code.co_name.startswith(("_", "wrapper"))]
    files = (Path(frame.f_code.co_filename).name for frame in frames[: len(inside) + 2])
    what = next((_WAITS[file] for file in files if file in _WAITS), public[-1] if public else None)
    groups = [frame.f_locals["group"] for frame in inside or frames[:1] if "group" in frame.f_locals]
    groups = [group for group in groups if group is None or isinstance(group, dist.ProcessGroup)]
    return what and (f"{what} over {_members(groups[-1])}" if groups else what)


def _is_torchs(frame: FrameType) -> bool:
    # Context managers of torch.distributed communicate when they exit.
    return frame.f_globals.get("__name__", "").startswith(("torch.distributed", "contextlib"))


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and ".venv" not in path.parts


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path)


def _members(group: Any) -> str:
    with contextlib.suppress(Exception):  # the group is being destroyed
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        return f"ranks {', '.join(map(str, ranks[:8]))}{' and more' if len(ranks) > 8 else ''}"
    return "unknown ranks"


def _frames_of_thread(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _frames_of_error(trace: TracebackType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(trace)][::-1]


def diagnose(reports: dict[int, RankStatus], ranks: int) -> str:
    """Which ranks have failed and which wait for them.

    Args:
        reports: the statuses of the ranks that have reported; the others are taken for dead or frozen.
        ranks: the world size.
    """
    silent = [rank for rank in range(ranks) if rank not in reports]
    failed = {rank: status for rank, status in reports.items() if status.error}
    stalled = {rank: status for rank, status in reports.items() if not status.error and not status.collective}
    waiting = {rank: status for rank, status in reports.items() if not status.error and status.collective}
    verb = "does" if len(silent) == 1 else "do"
    parts = [f"{format_ranks(silent)} {verb} not respond (dead or frozen)"] if silent else []
    parts += [f"rank {rank} {_failure(status)}" for rank, status in [*failed.items()][:3]]
    if not silent and not failed:
        parts += [f"rank {rank} stalled in {status}, in no collective" for rank, status in [*stalled.items()][:3]]
    launched = {rank: status.launched for rank, status in reports.items() if status.launched}
    parts += [
        f"rank {rank} waits in {status}{_not_joined(status, launched)}" for rank, status in [*waiting.items()][:3]
    ]
    return "the job ends: " + "; ".join(parts)


def _failure(status: RankStatus) -> str:
    """Describes an exception. A closed gloo connection is what the end of another rank looks like."""
    if status.error and "gloo/transport" in status.error:
        return f"lost its connection in {status}"
    return f"failed in {status}: {status.error}"


def _not_joined(status: RankStatus, launched: dict[int, dict[str, int]]) -> str:
    """The ranks that have not joined a collective, if the flight recorder has it."""
    missing = missing_from(status.pending, launched) if status.pending else []
    return f", which {format_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not joined" if missing else ""


def _trace() -> Trace | None:
    """The flight recorder's state under NCCL; None under gloo, whose blocking calls are visible in the stack."""
    with contextlib.suppress(Exception):  # a broken recorder must not hide the failure itself
        if dist.get_backend() == "nccl":
            return flight_recorder.trace()
    return None


class Watchdog:
    """Context manager that monitors this rank, and ends it after a failure on another rank. All ranks enter and leave
    it together. A world of one rank is not monitored.

    Args:
        timeout: seconds without progress on any rank after which the job has ended.
        progress: returns (current step, a value that changes while training makes progress); None: the ranks are still
            being built, and only the timeouts of collectives apply until `follow` is called.
        store: the ranks' store; None: that of the default process group.
        expected: exceptions that all ranks raise alike while they are built; they are not announced.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        progress: Callable[[], tuple[int, object]] | None = None,
        *,
        store: dist.Store | None = None,
        expected: tuple[type[Exception], ...] = (ValueError,),
    ) -> None:
        self.world, self._given_store, self._expected = world, store, expected
        self._progress = progress
        self._period = min(1.0, timeout / 20)
        self._grace = min(5.0, timeout / 5)
        self._stall_limit = timeout - 2 * self._grace - self._period
        self._hard_limit = 2 * timeout
        self._crash_file = 1
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._main = threading.get_ident()

    def __enter__(self) -> Self:
        if self.world.size > 1:
            # A separate connection: a waiting thread must not block the main thread's use of the store.
            given = self._given_store or default_store()
            self._store = TimeoutStore(lambda: dist.PrefixStore("watch", given.clone()))  # pyright: ignore[reportAttributeAccessIssue]
            with contextlib.suppress(StoreTimeout):  # connects now, while the store exists
                self._ask(lambda store: None)
            local_launcher.send_to_parent("watched", None)
            faulthandler.enable(file=self._crash_file)
            self._node = NodeWatch(self.world, self._period, lambda question: self._store.ask(question, self._period))
            self._thread.start()
        return self

    def follow(self, progress: Callable[[], tuple[int, object]]) -> None:
        """Starts monitoring progress."""
        self._progress = progress

    def dump_crashes_to(self, descriptor: int) -> None:
        """Where stack traces are written if this process crashes, or hangs so that no Python code runs; until this
        call, standard output."""
        self._crash_file = descriptor
        if self.world.size > 1:
            faulthandler.enable(file=descriptor)

    def progress(self) -> tuple[int, object]:
        return self._progress() if self._progress else (0, None)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        self._leaving.set()
        alike = self._progress is None and isinstance(error, self._expected)
        if error is not None and not alike:
            status = rank_status(self.progress()[0], _frames_of_error(trace), error, _trace())
            message = self._report(status)
            if message:
                error.add_note(message)
        self._thread.join()
        self._node.close()
        self._store.close()
        faulthandler.cancel_dump_traceback_later()
        self.dump_crashes_to(1)  # the other file may be closed now
        if error is None:
            dist.barrier()  # the store must exist until no rank reads it any more

    def _run(self) -> None:
        seen, since = self.progress(), time.monotonic()
        answered = since
        while not self._leaving.wait(self._node.pause):
            # If native code that holds the GIL blocks this thread too, faulthandler's C thread ends the process.
            faulthandler.dump_traceback_later(self._hard_limit, exit=True, file=self._crash_file)
            failed, has_answered = self._node.look()
            if has_answered:
                answered = time.monotonic()
            now = self.progress()
            if now != seen:
                seen, since = now, time.monotonic()
            waited = time.monotonic() - (since if self._progress else answered)
            if failed or waited > self._stall_limit:
                now_running = sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented
                frames = _frames_of_thread(now_running.get(self._main))
                status = rank_status(now[0], frames, trace=_trace())
                return self._end(self._report(status))

    def _report(self, status: RankStatus) -> str:
        """Announces a failure with this rank's status, logs its stack traces, and returns the diagnosis of all ranks'
        reports. Empty: every rank failed with an exception of its own."""
        # Not threading.enumerate, whose lock a thread that hangs may hold.
        known: dict[int, threading.Thread] = threading._active  # pyright: ignore[reportAttributeAccessIssue]
        stacks = [
            f"thread {known[ident].name if ident in known else ident}:\n" + "".join(traceback.format_stack(frame))
            for ident, frame in sys._current_frames().items()  # pyright: ignore[reportPrivateUsage]
        ]
        me = f"rank {self.world.rank} was"
        what = status.error or "no progress on this rank, or a failure on another"
        _LOG.error("failure in %s: %s\n%s", status, what, "\n".join(stacks))
        try:
            self._ask(lambda store: store.set(f"rank {self.world.rank}", json.dumps(asdict(status))))
            self._ask(lambda store: store.set("failure", ""))
            if self._ask(lambda store: store.add("reports", 1)) == 1:
                message = self._collect()
                self._ask(lambda store: store.set("diagnosis", message))
            end = time.monotonic() + 2 * self._grace
            while not (diagnosed := self._ask(lambda store: store.check(["diagnosis"]))) and time.monotonic() < end:
                time.sleep(max(self._period / 4, self.world.size / _REQUESTS))
            message = f"the job ends; {me} in {status}"
            if diagnosed:
                message = self._ask(lambda store: store.get("diagnosis")).decode()
        except StoreTimeout:
            host = rendezvous.store_host(self.world)
            message = f"the job ends: {host} does not answer (dead, frozen or out of reach); {me} in {status}"
        except Exception:
            message = f"the job ends: rank 0 has died, and with it the store of the ranks; {me} in {status}"
        if message:
            _LOG.error(message)
        return message

    def _ask(self, question: Callable[[dist.Store], T]) -> T:
        return self._store.ask(question, self._grace)

    def _collect(self) -> str:
        """The diagnosis, after all ranks have reported or the grace period has expired."""
        end = time.monotonic() + self._grace
        while time.monotonic() < end and self._ask(lambda store: store.add("reports", 0)) < self.world.size:
            time.sleep(self._period / 4)
        reports: dict[int, RankStatus] = {}
        for first in range(0, self.world.size, _KEYS):
            ranks = [*range(first, min(first + _KEYS, self.world.size))]
            if not self._has_reported(*ranks):
                ranks = [rank for rank in ranks if self._has_reported(rank)]
            keys = [f"rank {rank}" for rank in ranks]
            found = self._ask(lambda store, keys=keys: store.multi_get(keys)) if keys else []
            reports |= dict(zip(ranks, map(RankStatus.from_json, found), strict=True))
        if len(reports) == self.world.size and all(status.error for status in reports.values()):
            return ""
        return diagnose(reports, self.world.size)

    def _has_reported(self, *ranks: int) -> bool:
        return self._ask(lambda store: store.check([f"rank {rank}" for rank in ranks]))

    def _end(self, message: str) -> None:
        """Ends this process, unless its main thread is already leaving."""
        if self._leaving.wait(self._period):
            return
        if not local_launcher.send_to_parent("diagnosis", message) and should_print(self.world, message):
            print(f"switchyard: error: {visible(message)}", file=sys.stderr, flush=True)
        self._node.close()
        logging.shutdown()
        os._exit(FAILED)
