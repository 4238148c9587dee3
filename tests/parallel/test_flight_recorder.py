"""What a rank waits in where collectives return at once: from torch's own record of them."""

import json
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from parallel import flight_recorder, watchdog
from parallel.env import World
from parallel.flight_recorder import Pending, Trace, missing_from, read_trace
from parallel.local_launcher import RankFailed, RankPool
from parallel.watchdog import RankStatus, Watchdog, diagnose
from tests.parallel.helpers import started


def entry(record: int, group: str, sequence: int, state: str = "completed", **more: Any) -> dict[str, Any]:
    """As torch 2.11 to 2.13 write one, as far as it is read."""
    return {
        "record_id": record,
        "process_group": [group, "a description"],
        "collective_seq_id": sequence,
        "profiling_name": "nccl:all_reduce",
        "state": state,
        "retired": state == "completed",
        "is_p2p": False,
        **more,
    }


def test_a_dump_by_hand() -> None:
    entries = [
        entry(0, "0", 56),
        entry(1, "3", 7, profiling_name="nccl:_reduce_scatter_base"),
        entry(2, "0", 57, state="started"),
        entry(3, "3", 8, state="scheduled"),  # launched behind it
        entry(4, "0", 900, is_p2p=True, state="started"),  # messages between two ranks are numbered apart
    ]
    found = read_trace({"entries": entries}, {"0": [0, 1], "3": [1, 3]})
    assert found == Trace({"0": 57, "3": 8}, Pending("0", 57, "nccl:all_reduce", [0, 1]))
    assert str(found.pending) == "all_reduce number 57 over ranks 0, 1"
    assert read_trace({"entries": entries[:2]}, {}) == Trace({"0": 56, "3": 7}, None)
    assert read_trace({"entries": []}, {}) is None  # the recorder is off


def test_the_verdict_names_who_has_not_joined() -> None:
    """Rank 1 hangs in its data; the others' stacks show where the host reads a number, all alike."""
    pending = Pending("0", 57, "nccl:all_reduce", [0, 1, 2])
    at = "training/trainer.py:120 (_step)"
    waits = RankStatus(7, at, str(pending), None, pending, {"0": 57})
    told = {0: waits, 1: RankStatus(7, "corpus/stream.py:9 (sample)", None, None, None, {"0": 56}), 2: waits}
    assert missing_from(pending, {rank: place.launched for rank, place in told.items()}) == [1]
    assert diagnose(told, 3).startswith(
        "the job ends: rank 1 stalled in step 7, at corpus/stream.py:9 (sample), in no collective; "
        f"rank 0 waits in step 7 in all_reduce number 57 over ranks 0, 1, 2, at {at}, which rank 1 has not joined; "
    )
    # Two ranks that call collectives of two groups in another order wait for each other.
    other = Pending("1", 4, "nccl:_allgather_base", [0, 1])
    crossed = {
        0: RankStatus(7, at, str(pending), None, Pending("0", 57, "nccl:all_reduce", [0, 1]), {"0": 57, "1": 3}),
        1: RankStatus(7, at, str(other), None, other, {"0": 56, "1": 4}),
    }
    assert "which rank 1 has not joined" in diagnose(crossed, 2) and "which rank 0 has not joined" in diagnose(
        crossed, 2
    )


def test_whereabouts_travel_as_json() -> None:
    from dataclasses import asdict

    place = RankStatus(1, "a", "b", None, Pending("0", 1, "nccl:barrier", [0]), {"0": 1})
    assert RankStatus.from_json(json.dumps(asdict(place))) == place
    plain = RankStatus(1, "a", None)
    assert RankStatus.from_json(json.dumps(asdict(plain))) == plain


def read_later(world: World) -> None:
    """As under NCCL: the collective returns at once, and the host waits where it reads the result."""
    with started(world, ParallelConfig()):
        watchdog.dist.get_backend = lambda *_: "nccl"
        with Watchdog(world, 5.0, lambda: (3, None)):
            for _ in range(2):
                dist.all_reduce(torch.ones(1))
            if world.rank == 1:
                time.sleep(600)
            work = dist.all_reduce(torch.ones(1), async_op=True)
            while not work.is_completed():  # stands for .item()
                time.sleep(0.01)


@pytest.mark.skipif(
    not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"),
    reason="this torch does not record gloo's collectives",
)
def test_a_recorded_hang_is_laid_at_the_right_ranks_door() -> None:
    """torch's own record of a process group whose work objects return at once."""
    size = os.environ.get("TORCH_FR_BUFFER_SIZE")
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    try:
        with RankPool(2) as pool, pytest.raises(RankFailed) as failure:
            pool.run(2, read_later, timeout=60)
    finally:
        os.environ.pop("TORCH_FR_BUFFER_SIZE") if size is None else os.environ.update(TORCH_FR_BUFFER_SIZE=size)
    message = str(failure.value)
    assert "rank 1 stalled in step 3, at tests/parallel/test_flight_recorder.py" in message, message
    assert "rank 0 waits in step 3 in all_reduce number" in message and "which rank 1 has not joined" in message


def test_a_record_that_cannot_be_read_hides_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.dist, "get_backend", lambda *_: "nccl")
    monkeypatch.setattr(flight_recorder, "flight_recorder_dump", lambda: b"not JSON")
    assert watchdog._trace() is None
