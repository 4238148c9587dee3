"""Signals that ask for an end, and updates that are left out."""

import os
import signal

import pytest
import torch

from training.guard import GO_ON, LEAVE, STOP, RunFailed, SkipCounter, StopRequest


def test_a_signal_is_remembered_and_a_second_ctrl_c_interrupts(runtime: object) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert not stop.agreed(torch.device("cpu"))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(torch.device("cpu")) and stop.received == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)  # asked already: nothing more
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0.1)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_to_leave_goes_before_to_stop(runtime: object) -> None:
    stop = StopRequest((), received="SIGUSR1")
    assert stop.agreed(torch.device("cpu")) == STOP and stop.agreed(torch.device("cpu"), leave=True) == LEAVE
    assert StopRequest(()).agreed(torch.device("cpu")) == GO_ON


def test_skipped_updates_are_counted_in_a_row() -> None:
    counter = SkipCounter(limit=2)
    assert counter.skipped(4, []).startswith("step 4: update skipped, not finite: loss (1 in a row, 2 allowed)")
    counter.applied()
    counter.skipped(6, ["gradient of a"])
    assert "gradient of a (2 in a row" in counter.skipped(7, ["gradient of a"])
    with pytest.raises(RunFailed, match="step 8"):
        counter.skipped(8, [])
    assert counter.total == 4
