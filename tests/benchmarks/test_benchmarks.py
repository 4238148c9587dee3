"""The benchmarks run at a small size and print their results."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import fp8_training, kernels, optimizer_states
from benchmarks.measurement import Result, peak_bytes, saved_bytes
from benchmarks.moe_layer import DENSE, FORCED, MEGATRON, OURS, TRANSFORMERS, half_to_one_expert
from benchmarks.moe_layer import summary as layer_summary
from benchmarks.train_step import summary as step_summary
from benchmarks.workers import alternate, start_workers, timed
from conf.schema import MoeConfig
from parallel.threads import SPINS
from tests.moe.helpers import random, sparse_layer, tiny
from tests.ops.scaled_mm import OnGPU

TOY = {
    "moe_layer": ["--tokens=16", "--hidden=16", "--width=8", "--chunk-rows=4", "--experts", "2", "4"],
    "train_step": [
        "--layers=1",
        "--hidden=16",
        "--heads=2",
        "--width=8",
        "--vocabulary=32",
        "--sequence=8",
        "--batch=2",
    ],
}


def run(name: str) -> dict:
    """The one line that the command prints with --json; weights of an installed Transformers are not fetched."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--repetitions=1", *TOY[name]]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment)
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_layer_benchmark_prints_its_ratios() -> None:
    printed = run("moe_layer")
    assert list(printed) == ["ratio_dense", "ratio_balanced", "ratio_megatron", "ratio_transformers", "peak_mib"]
    assert {"switchyard", "dense", "megatron"} < printed["peak_mib"].keys()
    assert list(printed["ratio_dense"]) == list(printed["ratio_balanced"]) == ["2", "4"]
    assert min(*printed["ratio_dense"].values(), *printed["ratio_balanced"].values(), printed["ratio_megatron"]) > 0
    assert (printed["ratio_transformers"] is None) == (importlib.util.find_spec("transformers") is None)


def test_step_benchmark_prints_its_ratios() -> None:
    printed = run("train_step")
    speed = printed["tokens_per_second"]
    assert printed["ratio_megatron"] == pytest.approx(speed["switchyard"] / speed["megatron"], rel=0.02)
    assert (printed["ratio_transformers"] is None) == (importlib.util.find_spec("transformers") is None)


def test_checkpoint_benchmark_prints_how_long_training_is_blocked() -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--hidden=16", "--layers=1", "--repetitions=1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment)
    assert re.search(r"synchronous +[\d.]+ s\n +in the background +[\d.]+ s  \([\d.]+ of it", done.stdout)


class FakeWorker:
    """Stands for an implementation in another process."""

    def __init__(self, name: str, log: list[str], seconds: list[float]):
        self.name, self.log, self.seconds = name, log, iter(seconds)

    def measure(self, name: str) -> float:
        self.log.append(self.name + name)
        return next(self.seconds)


def test_measurements_alternate_and_the_first_round_is_a_warm_up() -> None:
    log: list[str] = []
    workers = {"a": FakeWorker("a", log, [90.0, 1.0, 5.0, 2.0]), "b": FakeWorker("b", log, [0.0, 7.0, 8.0, 9.0])}
    assert alternate(workers, "?", repetitions=3) == {"a": 2.0, "b": 8.0}
    assert log == ["a?", "b?"] * 4


def build_fake(fails: bool) -> dict[str, Callable[[], object]]:
    if fails:
        raise FileNotFoundError("no such peer")
    variables = {name: functools.partial(os.environ.get, name) for name in ("GLIBC_TUNABLES", "GOMP_SPINCOUNT")}
    return {"process": os.getpid, "sum": timed(lambda: sum([1, 2])), **variables}


def test_each_implementation_has_its_own_process() -> None:
    """Only ours keeps memory and waits briefly; errors name the implementation."""
    if {"GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        pytest.skip("settings of the C library or of OpenMP are in the environment, which processes inherit")
    builds = {name: functools.partial(build_fake, False) for name in ("ours", "peer")}
    with start_workers(builds, ("ours",), peers_as_ours=False) as workers:
        assert len({os.getpid(), *(worker.measure("process") for worker in workers.values())}) == 3
        assert [worker.measure("GLIBC_TUNABLES") for worker in workers.values()] == [None, ""]
        assert [worker.measure("GOMP_SPINCOUNT") for worker in workers.values()] == [SPINS, None]
        assert workers["ours"].measure("sum") > 0
        with pytest.raises(RuntimeError, match=r"(?s)peer, 'colour'.*KeyError"):
            workers["peer"].measure("colour")
    broken = start_workers({"peer": functools.partial(build_fake, True)}, (), peers_as_ours=False)
    with pytest.raises(RuntimeError, match=r"(?s)peer.*no such peer"), broken:
        pass


def test_saved_bytes_are_those_allocated_after_the_forward_pass() -> None:
    """Of 100 fp32 values: exp keeps its result, sin its input, cos goes; a view and the caller's own do not count."""
    x = torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x.exp().view(10, 10).sin().sum() + x.detach().cos().sum()) == 100 * 4 + 4


def test_peak_bytes() -> None:
    """1000 fp32 values and, one after the other, 2000 and 500 more."""

    def step() -> None:
        kept = torch.empty(1000)
        torch.empty(2000)
        torch.empty(500).copy_(kept[:500])

    assert peak_bytes(step) == 3000 * 4


def test_half_of_the_tokens_go_to_one_expert(runtime) -> None:
    layer = sparse_layer(tiny(MoeConfig(num_experts=4, capacity_factor=None)), runtime)
    x_SBD = half_to_one_expert(layer, random(40, 1, 8).to(runtime.device))
    experts = layer.router(x_SBD.flatten(0, 1)).experts_TK.flatten().tolist()
    assert all((e == 0) == (t % 2 == 0) for t, e in enumerate(experts)) and len(set(experts)) == 4


def test_ratios_take_the_fastest_variant_of_a_peer() -> None:
    eager, grouped = TRANSFORMERS
    seconds = {OURS: 2.0, DENSE: 1.0, MEGATRON[0]: 3.0, eager: 8.0, grouped: 5.0, FORCED: 1.0}
    results = {name: Result(s, 0) for name, s in seconds.items()}
    ratios = {"ratio_dense": {"8": 2.0}, "ratio_balanced": {"8": 0.5}}
    assert layer_summary({8: results}) == ratios | {"ratio_megatron": 1.5, "ratio_transformers": 2.5}
    assert step_summary(results, tokens=60)["ratio_transformers"] == 2.5
    del results[eager], results[grouped]
    assert layer_summary({8: results})["ratio_transformers"] is None
    assert step_summary(results, tokens=60)["ratio_transformers"] is None


def test_kernel_benchmark_needs_a_gpu_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="needs a GPU"):
        kernels.main([])


def test_kernel_benchmark_calls_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers and FP8 casts at a small size, in Triton's interpreter without a GPU, and with a stand-in for
    torch's scaled_mm. The other parts are in tests/ops/test_benchmark.py."""
    pytest.importorskip("triton", reason="Triton is not installed: bash launch/setup.sh kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", OnGPU())
    for benchmark in (kernels.linear_layers(16, 128, 128, device), kernels.rounding(16, 64, device)):
        for call in benchmark.values():
            call()
    assert kernels.ratios({"a": 1.0, "b": 0.5, "c": None}) == {"a": 1.0, "b": 2.0, "c": None}


def test_fp8_training_compares_the_last_steps() -> None:
    losses = {"bf16": [9.0, 4.0, 2.0], "fp8": [1.0, 4.01, 2.02]}
    found = fp8_training.summary([losses], last=2)
    assert found == {
        "seeds": 1,
        "loss_bf16": 3.0,
        "loss_fp8": 3.015,
        "difference_fp8": 0.005,
        "standard_error_fp8": None,
        "within_bar": False,
    }


def test_fp8_training_averages_over_seeds() -> None:
    """Differences of 3 % and -2.6 %: their mean is 0.2 %, the standard error of two values half their distance."""
    runs = [{"bf16": [2.0], "fp8": [2.06], "fp32": [2.02]}, {"bf16": [5.0], "fp8": [4.87], "fp32": [5.05]}]
    found = fp8_training.summary(runs, last=1)
    assert found["difference_fp8"] == 0.002 and found["within_bar"]
    assert found["standard_error_fp8"] == 0.028
    assert found["difference_fp32"] == 0.01 and found["standard_error_fp32"] == 0.0


def test_optimizer_states_compares_every_seed_with_its_own() -> None:
    """Differences of 3 % and -2.6 %, as above; nothing beside itself."""
    found = optimizer_states.summary({"fp32": [2.0, 5.0], "moments bf16": [2.06, 4.87]})
    assert found["fp32"]["difference"] == 0 and found["fp32"]["within_bar"]
    assert found["moments bf16"]["difference"] == pytest.approx(0.002) and found["moments bf16"]["within_bar"]
    assert found["moments bf16"]["standard_error"] == pytest.approx(0.028)


def test_optimizer_states_asks_for_what_it_says() -> None:
    changes = optimizer_states.VARIANTS["both bf16"]
    assert optimizer_states.command(changes, "bf16")[1:] == ["-m", "launch.train", *changes]
    emulated = optimizer_states.command(changes, "fp32")
    assert "with_bf16_buckets" in emulated[2] and emulated[3:] == ["optim.state_dtype=bf16"]


def test_conversion_prints_memory_and_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.conversion", "--gb=0.001", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    size, *lines = done.stdout.splitlines()
    assert re.fullmatch(r"0\.00\d+ GB in bf16, largest tensor 0 MiB", size)
    for line, what in zip(lines, ("import", "export"), strict=True):
        found = re.fullmatch(rf"{what}, NPROC=1: [\d.]+ s, at most ([\d,]+) MiB resident", line)
        assert found and 100 < int(found[1].replace(",", "")) < 2000, line
    assert not list(tmp_path.iterdir())
