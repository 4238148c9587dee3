"""The experts' backend: measured once, and then the same for the run, its ranks and its later lives."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import Config, DataConfig, ModelConfig, MoeConfig, ParallelConfig, TrainConfig
from ops import autotune
from ops.experts import EXPERTS, ExpertBackend, Shapes, loop_experts
from ops.run_context import RunContext
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import BACKENDS_THAT_RUN, expert_backend, selected
from tests.parallel.helpers import started
from training.measurements import Measurements

FAST = {"loop": 1.0, "fused": 1.2, "grouped_mm": 2.0}
MEASURE = autotune.measure


def config_of(tmp_path: Path, **moe: object) -> Config:
    model = ModelConfig(hidden_size=16, ffn_hidden_size=16, moe=MoeConfig(**{"num_experts": 4} | moe))
    return Config(model=model, data=DataConfig(cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What measuring finds, one entry for each time; without entries it must not measure."""
    found: list[dict[str, float]] = []
    monkeypatch.setattr("ops.autotune.measure", lambda steps, device: found.pop(0))
    return found


def chosen(config: Config, runtime: Runtime, run_dir: Path | None) -> tuple[str, str]:
    memory = Measurements(config.data.cache_dir, run_dir) if run_dir else None
    _, row = selected(EXPERTS, RunContext(config, runtime, torch.float32), memory)
    return row.name, row.why


@pytest.mark.parametrize(
    ("found", "backend"),
    [
        (FAST, "loop"),
        (FAST | {"fused": 1.04}, "fused"),  # by rule, and no slower than noise
        (FAST | {"grouped_mm": 0.5}, "grouped_mm"),
        ({"loop": 3.0}, "loop"),  # the others failed
    ],
)
def test_the_fastest_is_taken(
    found: dict[str, float], backend: str, runtime: Runtime, times: list, tmp_path: Path
) -> None:
    times.append(found)
    got, why = chosen(config_of(tmp_path), runtime, tmp_path)
    assert got == backend and why.startswith("measured: ") and f"{backend} {found[backend] * 1e3:.1f} ms" in why
    for name in {"loop", "grouped_mm", "fused"} - found.keys():
        assert f", {name} failed" in why
    assert ("; fused is as fast, within noise" in why) == (backend == "fused")


def test_measured_once_for_all_runs_of_the_shapes(runtime: Runtime, times: list, tmp_path: Path) -> None:
    times.append(FAST)
    first, _ = chosen(config_of(tmp_path), runtime, tmp_path / "one")
    second, why = chosen(config_of(tmp_path), runtime, tmp_path / "two")
    assert first == second == "loop" and why.startswith("measured before: ")
    times.append(FAST | {"loop": 9.0})
    other = config_of(tmp_path, top_k=2)
    assert chosen(other, runtime, tmp_path / "three")[0] == "fused"


def test_measured_where_the_cache_cannot_be_written_to(
    runtime: Runtime, times: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    times.append(FAST)
    backend, why = chosen(config_of(tmp_path), runtime, tmp_path)
    assert backend == "loop" and why.startswith("measured: ") and not list((tmp_path / "cache").iterdir())


def test_a_run_keeps_its_backend(runtime: Runtime, times: list, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    memory = Measurements(config.data.cache_dir, tmp_path)
    memory.remember("grouped_mm")
    assert json.loads((tmp_path / "expert_backend.json").read_text()) == {"backend": "grouped_mm"}
    assert chosen(config, runtime, tmp_path) == ("grouped_mm", "as before in this run")
    memory.remember("triton")  # not on this machine
    times.append(FAST)
    assert chosen(config, runtime, tmp_path)[0] == "loop"


def test_nothing_is_measured_where_the_answer_is_known(runtime: Runtime, times: list, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.train = TrainConfig(deterministic=True)
    backend, why = chosen(config, runtime, tmp_path)
    assert backend == "fused" and "train.deterministic=true" in why
    assert chosen(config_of(tmp_path, backend="grouped_mm"), runtime, tmp_path) == ("grouped_mm", "asked for")
    assert chosen(config_of(tmp_path), runtime, None)[0] == "fused"


def test_too_slow_to_measure_is_told_and_not_remembered(
    runtime: Runtime, times: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(autotune, "measure", MEASURE)
        patched.setattr(autotune, "BUDGET", 0.0)
        backend, why = chosen(config_of(tmp_path), runtime, tmp_path)
    assert backend == "fused" and why == "by rule; not measured: a round takes more than 0 s"
    times.append(FAST)
    assert chosen(config_of(tmp_path), runtime, tmp_path)[0] == "loop"


def choose_on_rank(world: World, folder: str, lacking: tuple[int, ...]) -> tuple[str, str]:
    def measured(steps: dict[str, object], device: torch.device) -> dict[str, float]:
        assert world.rank == 0
        return {name: (FAST | {"grouped_mm": 0.5})[name] for name in steps}

    with pytest.MonkeyPatch.context() as patched, started(world, ParallelConfig()) as runtime:
        patched.setattr(autotune, "measure", measured)
        if world.rank in lacking:
            has = [i for i in EXPERTS.implementations if i.name != "grouped_mm"]
            patched.setattr(EXPERTS, "implementations", has)
        return chosen(config_of(Path(folder)), runtime, Path(folder) / str(world.rank))


@pytest.mark.parametrize(("lacking", "backend"), [((), "grouped_mm"), ((1,), "loop")])
def test_rank_0_decides_for_all_by_what_all_have(lacking: tuple[int, ...], backend: str, ranks, tmp_path: Path) -> None:
    answers = ranks.run(2, choose_on_rank, str(tmp_path), lacking, timeout=60)
    assert answers[0][0] == answers[1][0] == backend
    assert ("grouped_mm cannot run on every node" in answers[0][1]) == bool(lacking)


def rule_on_rank(world: World, folder: str) -> tuple[tuple[str, str], ...]:
    """Rank 1's processor has faster matrix instructions, rank 0's has not."""
    config = config_of(Path(folder))
    config.train = TrainConfig(deterministic=True)
    with pytest.MonkeyPatch.context() as patched, started(world, ParallelConfig()) as runtime:
        default = "grouped_mm" if world.rank else "fused"
        ruled = [replace(i, is_default=lambda context, own=i.name: own == default) for i in EXPERTS.implementations]
        patched.setattr(EXPERTS, "implementations", ruled)
        return chosen(config, runtime, Path(folder)), chosen(config, runtime, None)


def test_rank_0_rules_for_all(ranks, tmp_path: Path) -> None:
    answers = ranks.run(2, rule_on_rank, str(tmp_path), timeout=60)
    assert [[backend for backend, _ in told] for told in answers] == [["fused"] * 2] * 2


def ask_for_grouped_mm(world: World, width: int) -> str:
    config = config_of(Path(), backend="grouped_mm")
    config.model.ffn_hidden_size = width
    with started(world, ParallelConfig(etp=2)) as runtime:
        try:
            return chosen(config, runtime, None)[0]
        except ValueError as error:
            return str(error)


def test_a_rank_s_slice_of_an_expert_has_to_be_aligned(ranks) -> None:
    """16 bytes: four values of fp32."""
    assert ranks.run(2, ask_for_grouped_mm, 16, timeout=60) == ["grouped_mm"] * 2
    for told in ranks.run(2, ask_for_grouped_mm, 12, timeout=60):
        assert told.startswith("model.moe.backend=grouped_mm needs rows of a multiple of 16 bytes; 6 values of")


def steps_of(shapes: Shapes, backends: dict[str, Callable[..., Any]]) -> dict[str, autotune.Step]:
    return {name: shapes.step(ExpertBackend(run), torch.device("cpu")) for name, run in backends.items()}


def test_measuring_times_every_backend_and_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "BUDGET", 60.0)  # Triton's interpreter beside other tests

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    shapes = Shapes(64, 16, 16, 4, "swiglu", True, "float32")
    steps = steps_of(shapes, {**{name: expert_backend(name).run for name in BACKENDS_THAT_RUN}, "broken": broken})
    seconds = autotune.measure(steps, torch.device("cpu"))
    assert list(seconds) == BACKENDS_THAT_RUN and all(s > 0 for s in seconds.values())


def test_compilation_is_not_running_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes longer to compile than all rounds may last, on a GPU for every new row count."""
    compiled: set[tuple[int, ...]] = set()

    def once(*arguments: Any) -> torch.Tensor:
        if not compiled:
            time.sleep(1.2 * autotune.BUDGET)
            compiled.add(())
        return loop_experts(*arguments)

    def per_counts(x: torch.Tensor, counts: list[int], *rest: Any) -> torch.Tensor:
        if tuple(counts) not in compiled:
            compiled.add(tuple(counts))
            time.sleep(0.3)
        return loop_experts(x, counts, *rest)

    shapes, cpu = Shapes(640, 16, 16, 4, "swiglu", True, "float32"), torch.device("cpu")
    assert autotune.measure(steps_of(shapes, {"loop": loop_experts, "compiled": once}), cpu)["compiled"] < 0.2
    monkeypatch.setattr(autotune, "_untimed", lambda device, real=autotune._untimed: real(torch.device("cuda")))
    slept = time.perf_counter()
    assert autotune.measure(steps_of(shapes, {"compiled": per_counts}), cpu)["compiled"] < 0.2
    assert time.perf_counter() - slept > 0.3 * autotune.REPETITIONS


def test_no_two_rounds_have_the_same_rows() -> None:
    """A kernel that oneDNN builds for one row count must cost every round, as it costs every step."""
    shapes = Shapes(8192, 16, 16, 8, "swiglu", False, "bfloat16")
    rounds = [*autotune._untimed(torch.device("cpu")), *range(autotune.REPETITIONS)]
    counts = [shapes.counts(repetition) for repetition in rounds]
    assert all(sum(each) == 8192 and min(each) > 0 for each in counts)
    assert len({n for each in counts for n in each}) > 0.8 * 8 * len(counts)
