"""Batches that a thread reads before they are asked for."""

import threading
import traceback

import pytest

from corpus.read_ahead import ReadAhead

LIMIT = 60.0
"""Seconds after which something that should have happened did not; nothing depends on it otherwise."""


class SlowData:
    """A data set that reads a batch only when it is let, and says how many it has read."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.changed = threading.Condition()
        self.let = threading.Semaphore(0)

    def load(self, first: int) -> int:
        assert self.let.acquire(timeout=LIMIT)
        with self.changed:
            self.read.append(first)
            self.changed.notify_all()
        return first

    def await_read(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.read) >= count, LIMIT)


def test_a_slow_data_set_is_read_while_a_step_is_computed() -> None:
    data = SlowData()
    batches = ReadAhead(data.load, range(0, 40, 8), depth=2)
    data.let.release(2)
    for step in range(4):
        assert batches.next() == 8 * step
        # The step computes. It need not end for the batch of the step after the next to be read.
        data.let.release()
        data.await_read(min(step + 3, 5))
    assert batches.next() == 32
    assert data.read == [0, 8, 16, 24, 32]
    batches.close()


def test_no_more_than_the_given_number_is_held() -> None:
    data = SlowData()
    batches = ReadAhead(data.load, range(100), depth=3)
    data.let.release(100)
    data.await_read(3)
    batches._thread.join(0.2)
    assert data.read == [0, 1, 2]
    assert batches.next() == 0
    data.await_read(4)
    batches.close()
    assert not batches._thread.is_alive()  # though it had more to read


def failing(first: int) -> int:
    if first == 16:
        raise OSError("the disk is gone")
    return first


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_in_place_of_its_batch(depth: int) -> None:
    batches = ReadAhead(failing, range(0, 80, 8), depth=depth)
    assert [batches.next(), batches.next()] == [0, 8]
    with pytest.raises(OSError, match="the disk is gone") as failure:
        batches.next()
    assert "in failing" in "".join(traceback.format_exception(failure.value)), "where it was raised is shown"
    batches.close()


def test_nothing_is_read_before_it_is_needed_without_a_depth() -> None:
    data = SlowData()
    data.let.release(10)
    batches = ReadAhead(data.load, range(0, 80, 8), depth=0)
    assert batches.next() == 0 and data.read == [0]
    batches.close()


def test_a_thread_that_storage_does_not_answer_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.read_ahead._LEAVE_SECONDS", 0.05)
    data = SlowData()
    batches = ReadAhead(data.load, range(9), depth=1)
    batches.close()
    assert batches._thread.is_alive() and batches._thread.daemon
    data.let.release()
    batches._thread.join(LIMIT)
    assert not batches._thread.is_alive()
