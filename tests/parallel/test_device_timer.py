"""The step's time on a GPU, whose work goes on when the host has come to its end; the GPU is a stand-in."""

import time

import pytest
import torch

from parallel.device_timer import StepTimer


class Device:
    """A queue: what is launched begins when what was launched before is over."""

    def __init__(self) -> None:
        self.host, self.free = 0.0, 0.0

    def launch(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.free)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(made.free, made.host)

        def synchronize(self) -> None:
            made.host = max(made.host, self.at)

        def query(self) -> bool:
            return self.at <= made.host

        def elapsed_time(self, end: "Event") -> float:
            assert max(self.at, end.at) <= made.host, "the device has not come to this event"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def step(clock: StepTimer, device: Device, *, data: float, model: float, optimizer: float) -> None:
    clock.start()
    device.host += data
    device.launch(model)
    device.wait()  # the loss is read
    device.launch(optimizer)
    clock.stop()


def test_the_optimizers_kernels_and_the_wait_for_data_belong_to_the_step(device: Device) -> None:
    clock = StepTimer(torch.device("cuda"))
    step(clock, device, data=0.25, model=2.0, optimizer=0.5)
    assert clock.read() == pytest.approx(2.75)
    device.host += 100.0  # an evaluation
    for _ in range(3):
        # While the optimizer's kernels run, the next step's data are fetched.
        step(clock, device, data=0.25, model=2.0, optimizer=0.5)
    now = device.host
    assert clock.read() == pytest.approx((2.75 + 2.5) / 2)  # of the two that have ended
    assert clock.read() == pytest.approx((2.75 + 2.5) / 2)  # none since
    assert device.host == now, "the host has waited for the optimizer"
    step(clock, device, data=0.25, model=2.0, optimizer=1.5)
    device.wait()
    assert clock.read() == pytest.approx((2.5 + 3.5) / 2)


def test_on_a_cpu_the_host_is_the_device() -> None:
    clock = StepTimer(torch.device("cpu"))
    for _ in range(2):
        clock.start()
        time.sleep(0.05)
        clock.stop()
        time.sleep(0.05)
    assert 0.05 <= clock.read() < 0.09
