"""Ends a job of many ranks when one of them stalls, dies or fails, within the time limit, with a message that names the
rank, its step and the collective that the others wait in, and with every rank's stack in its log.

A thread per rank looks at the training's progress and into the rendezvous store. Whoever sees trouble first, be it an
exception or a lack of progress, says so there; all ranks then write down where they are and end. What a rank waits in
is read off its stack, so that watching costs a collective nothing; under NCCL, whose calls return at once, it comes
from torch's flight recorder (parallel/flight_recorder.py).
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
from typing import Any, Self

import torch.distributed as dist

from conf.printable import visible
from parallel import flight_recorder, local_launcher, rendezvous
from parallel.env import World, should_print
from parallel.flight_recorder import Pending, Trace, format_ranks, missing_from
from parallel.rendezvous import StoreTimeout, TimeoutStore
from parallel.torch_private import default_store

FAILED = 1
"""Exit code of a rank that is ended here."""
_ROOT = Path(__file__).resolve().parent.parent
_LOG = logging.getLogger("switchyard")
# Messages that are waited for outside of torch.distributed, by the file of the innermost frame.
_WAITS = {
    "p2p_communication.py": "a message between pipeline stages",
    "param_and_grad_buffer.py": "the reduction of gradients or the gathering of weights",
}


@dataclass(frozen=True)
class RankStatus:
    """What a rank was doing when the trouble was told."""

    step: int
    at: str
    """File, line and function, the innermost of ours."""
    collective: str | None
    """What it waits in, with the ranks that take part; None: nothing that torch or Megatron-Core knows of."""
    error: str | None = None
    """The exception that it failed with."""
    pending: Pending | None = None
    """What it waits in by torch's record; None: nothing, or there is no record."""
    launched: dict[str, int] = field(default_factory=dict)
    """Collectives that it has launched in each process group, where there is a record."""

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
    trace: torch's record; None: the stack says what is waited in.
    """
    pending, launched = (trace.pending, trace.launched) if trace else (None, {})
    collective = (pending and str(pending)) if trace else _collective(frames)
    ours = next((f for f in frames if _is_ours(f)), frames[0])
    at = f"{_short(ours.f_code.co_filename)}:{ours.f_lineno} ({ours.f_code.co_name})"
    told = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return RankStatus(step, at, collective, told if error else None, pending, launched)


def _collective(frames: list[FrameType]) -> str | None:
    """What a stack, innermost first, waits in: the outermost function of torch.distributed at its end, or a wait of
    Megatron-Core's."""
    inside = list(itertools.takewhile(_is_torchs, frames))
    public = [frame.f_code.co_name for frame in inside if not frame.f_code.co_name.startswith(("_", "wrapper"))]
    files = (Path(frame.f_code.co_filename).name for frame in frames[: len(inside) + 2])
    what = next((_WAITS[file] for file in files if file in _WAITS), public[-1] if public else None)
    groups = [frame.f_locals["group"] for frame in inside if "group" in frame.f_locals]
    return what and (f"{what} over {_members(groups[-1])}" if groups else what)


def _is_torchs(frame: FrameType) -> bool:
    # A context manager of torch.distributed sends when it is left.
    return frame.f_globals.get("__name__", "").startswith(("torch.distributed", "contextlib"))


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and ".venv" not in path.parts


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path)


def _members(group: Any) -> str:
    with contextlib.suppress(Exception):  # a group that is being taken down
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


def verdict(told: dict[int, RankStatus], ranks: int) -> str:
    """Who is to blame and who waits for it, from what the ranks told; those that told nothing are gone."""
    gone = [rank for rank in range(ranks) if rank not in told]
    failed = {rank: place for rank, place in told.items() if place.error}
    stalled = {rank: place for rank, place in told.items() if not place.error and not place.collective}
    waiting = {rank: place for rank, place in told.items() if not place.error and place.collective}
    parts = [f"{format_ranks(gone)} {'is' if len(gone) == 1 else 'are'} gone or frozen, without a word"] if gone else []
    parts += [f"rank {rank} {_failure(place)}" for rank, place in [*failed.items()][:3]]
    if not gone and not failed:
        parts += [f"rank {rank} stalled in {place}, in no collective" for rank, place in [*stalled.items()][:3]]
    launched = {rank: place.launched for rank, place in told.items() if place.launched}
    parts += [f"rank {rank} waits in {place}{_not_joined(place, launched)}" for rank, place in [*waiting.items()][:3]]
    return "the job ends: " + "; ".join(parts)


def _failure(place: RankStatus) -> str:
    """A closed connection is what the end of another rank looks like; gloo's words for it say nothing else."""
    if place.error and "gloo/transport" in place.error:
        return f"lost its connection in {place}"
    return f"failed in {place}: {place.error}"


def _not_joined(place: RankStatus, launched: dict[int, dict[str, int]]) -> str:
    """Who keeps a collective from ending, where torch has a record of it."""
    missing = missing_from(place.pending, launched) if place.pending else []
    return f", which {format_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not joined" if missing else ""


def _trace() -> Trace | None:
    """torch's record under NCCL; None under gloo, whose stacks say more: its calls wait where they are made."""
    with contextlib.suppress(Exception):  # a record that cannot be read must not hide the trouble itself
        if dist.get_backend() == "nccl":
            return flight_recorder.trace()
    return None


class Watchdog:
    """While entered, this rank's training is watched, and trouble on other ranks ends it. Every rank enters and leaves
    together; a world of one rank has nobody to wait for and is not watched.

    Args:
        timeout: seconds without progress on any rank after which the job has ended.
        progress: (step under way, anything that changes while the training goes on); None: the ranks are still being
            built, each at its own pace, which collectives limit, until `follow` is called.
        store: of the ranks; None: the default process group's.
        expected: exceptions that every rank raises alike while it is built: nobody has to be told.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        progress: Callable[[], tuple[int, Any]] | None = None,
        *,
        store: dist.Store | None = None,
        expected: tuple[type[Exception], ...] = (ValueError,),
    ) -> None:
        self.world, self._given, self._expected = world, store, expected
        self._followed = progress
        self._period = min(1.0, timeout / 20)
        self._grace = min(5.0, timeout / 5)
        self._patience = timeout - 2 * self._grace - self._period
        self._backstop = 2 * timeout
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._main = threading.get_ident()

    def __enter__(self) -> Self:
        if self.world.size > 1:
            # Its own connection: a thread that waits must not keep the main thread from the store.
            given = self._given or default_store()
            self._store = TimeoutStore(lambda: dist.PrefixStore("watch", given.clone()))
            with contextlib.suppress(StoreTimeout):  # connects now, while the store is sure to be there
                self._ask(lambda store: None)
            local_launcher.send_to_parent("watched", None)
            faulthandler.enable(file=1)  # in a run, train.log
            self._thread.start()
        return self

    def follow(self, progress: Callable[[], tuple[int, Any]]) -> None:
        """From now on a rank without progress is in trouble."""
        self._followed = progress

    def progress(self) -> tuple[int, Any]:
        return self._followed() if self._followed else (0, None)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        self._leaving.set()
        alike = self._followed is None and isinstance(error, self._expected)
        if error is not None and not alike:
            place = rank_status(self.progress()[0], _frames_of_error(trace), error, _trace())
            told = self._tell(place)
            if told:
                error.add_note(told)
        self._thread.join()
        self._store.close()
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            dist.barrier()  # nobody may take the store down while others still look into it

    def _run(self) -> None:
        seen, since = self.progress(), time.monotonic()
        answered = since
        while not self._leaving.wait(self._period):
            # Where even this thread is held up, by native code that keeps Python's lock, one without Python ends it.
            faulthandler.dump_traceback_later(self._backstop, exit=True, file=1)
            try:
                troubled = self._store.ask(lambda store: store.check(["trouble"]), self._period)
                answered = time.monotonic()
            except StoreTimeout:  # it may be busy; what it takes to be in trouble is decided below
                troubled = False
            except Exception:  # the store is gone; _tell will say so
                troubled = True
            now = self.progress()
            if now != seen:
                seen, since = now, time.monotonic()
            waited = time.monotonic() - (since if self._followed else answered)
            if troubled or waited > self._patience:
                frames = _frames_of_thread(sys._current_frames().get(self._main))
                place = rank_status(now[0], frames, trace=_trace())
                return self._end(self._tell(place))

    def _tell(self, place: RankStatus) -> str:
        """Tells the others of trouble and where this rank is, writes its stack down, and returns what all of it comes
        to. Empty: every rank failed by itself."""
        stacks = [
            f"thread {threading._active[ident].name if ident in threading._active else ident}:\n"
            + "".join(traceback.format_stack(frame))
            for ident, frame in sys._current_frames().items()
        ]
        me = f"rank {self.world.rank} was"
        _LOG.error("trouble in %s: %s\n%s", place, place.error or "no progress, or another rank's", "\n".join(stacks))
        try:
            self._ask(lambda store: store.set(f"rank {self.world.rank}", json.dumps(asdict(place))))
            self._ask(lambda store: store.set("trouble", ""))
            if self._ask(lambda store: store.add("witnesses", 1)) == 1:
                told = self._collect()
                self._ask(lambda store: store.set("verdict", told))
            end = time.monotonic() + 2 * self._grace
            while not (known := self._ask(lambda store: store.check(["verdict"]))) and time.monotonic() < end:
                time.sleep(self._period / 4)
            told = self._ask(lambda store: store.get("verdict")).decode() if known else f"the job ends; {me} in {place}"
        except StoreTimeout:
            store_host = rendezvous.store_host(self.world)
            told = f"the job ends: {store_host} does not answer (dead, frozen or out of reach); {me} in {place}"
        except Exception:
            told = f"the job ends: rank 0 is gone, and with it the store of the ranks; {me} in {place}"
        if told:
            _LOG.error(told)
        return told

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        return self._store.ask(question, self._grace)

    def _collect(self) -> str:
        """The verdict, once all ranks have told where they are or had the time to."""
        told: dict[int, RankStatus] = {}
        end = time.monotonic() + self._grace
        while len(told) < self.world.size and time.monotonic() < end:
            for rank in {*range(self.world.size)} - told.keys():
                key = f"rank {rank}"
                if self._ask(lambda store, key=key: store.check([key])):
                    told[rank] = RankStatus.from_json(self._ask(lambda store, key=key: store.get(key)))
            time.sleep(self._period / 4)
        told = dict(sorted(told.items()))
        if len(told) == self.world.size and all(place.error for place in told.values()):
            return ""
        return verdict(told, self.world.size)

    def _end(self, told: str) -> None:
        """Ends this process, unless its main thread is about to end by itself."""
        if self._leaving.wait(self._period):
            return
        if not local_launcher.send_to_parent("diagnosis", told) and should_print(self.world, told):
            print(f"switchyard: error: {visible(told)}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(FAILED)
