"""The experts' backend: measured once, and then the same for the run, its ranks and its later lives."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import Config, DataConfig, ModelConfig, MoeConfig, ParallelConfig, TrainConfig
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import BACKENDS_THAT_RUN
from tests.parallel.helpers import started

FAST = {"loop": 1.0, "fused": 1.2, "grouped_mm": 2.0}


def config_of(tmp_path: Path, **moe: object) -> Config:
    model = ModelConfig(hidden_size=16, ffn_hidden_size=16, moe=MoeConfig(**{"num_experts": 4} | moe))
    return Config(model=model, data=DataConfig(cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What measuring finds, one entry for each time; without entries it must not measure."""
    found: list[dict[str, float]] = []
    monkeypatch.setattr("training.expert_backend.measure", lambda names, shapes, device: found.pop(0))
    return found


def chosen(config: Config, runtime: Runtime, run_dir: Path | None) -> tuple[str, str]:
    from training import expert_backend

    return expert_backend.choose(config, runtime, torch.float32, run_dir)


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
    from training import expert_backend

    config = config_of(tmp_path)
    expert_backend.remember(config, tmp_path, "grouped_mm")
    assert chosen(config, runtime, tmp_path) == ("grouped_mm", "as before in this run")
    expert_backend.remember(config, tmp_path, "triton")  # not on this machine
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
    from ops import autotune as room

    with monkeypatch.context() as patched:
        patched.setattr("training.expert_backend.measure", room.measure)
        patched.setattr(room, "BUDGET", 0.0)
        backend, why = chosen(config_of(tmp_path), runtime, tmp_path)
    assert backend == "fused" and why == "by rule; not measured: a round takes more than 0 s"
    times.append(FAST)
    assert chosen(config_of(tmp_path), runtime, tmp_path)[0] == "loop"


def choose_on_rank(world: World, folder: str, lacking: tuple[int, ...]) -> tuple[str, str]:
    from training import expert_backend

    def measured(names: list[str], shapes: object, device: torch.device) -> dict[str, float]:
        assert world.rank == 0
        return {name: FAST[name] for name in names}

    with pytest.MonkeyPatch.context() as patched, started(world, ParallelConfig()) as runtime:
        patched.setattr(expert_backend, "measure", measured)
        if world.rank in lacking:
            patched.setattr(expert_backend, "available_backends", lambda *_: ["fused", "grouped_mm"])
        return chosen(config_of(Path(folder)), runtime, Path(folder) / str(world.rank))


@pytest.mark.parametrize(("lacking", "backend"), [((), "loop"), ((1,), "fused")])
def test_rank_0_decides_for_all_by_what_all_have(lacking: tuple[int, ...], backend: str, ranks, tmp_path: Path) -> None:
    answers = ranks.run(2, choose_on_rank, str(tmp_path), lacking, timeout=60)
    assert answers[0] == answers[1] and answers[0][0] == backend


def rule_on_rank(world: World, folder: str) -> tuple[tuple[str, str], ...]:
    """Rank 1's processor has faster matrix instructions, rank 0's has not."""
    from training import expert_backend

    config = config_of(Path(folder))
    config.train = TrainConfig(deterministic=True)
    with pytest.MonkeyPatch.context() as patched, started(world, ParallelConfig()) as runtime:
        ruled = ("grouped_mm" if world.rank else "loop", "by rule")
        patched.setattr(expert_backend, "choose_backend", lambda *_: ruled)
        return chosen(config, runtime, Path(folder)), chosen(config, runtime, None)


def test_rank_0_rules_for_all(ranks, tmp_path: Path) -> None:
    answers = ranks.run(2, rule_on_rank, str(tmp_path), timeout=60)
    assert [[backend for backend, _ in told] for told in answers] == [["loop"] * 2] * 2


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


def test_measuring_times_every_backend_and_leaves_out_what_fails() -> None:
    from moe.experts import BACKENDS
    from ops import autotune as room

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    shapes = room.Shapes(64, 16, 16, 4, "swiglu", True, "float32")
    seconds = room.measure(
        {**{name: BACKENDS[name] for name in BACKENDS_THAT_RUN}, "broken": broken}, shapes, torch.device("cpu")
    )
    assert list(seconds) == BACKENDS_THAT_RUN and all(s > 0 for s in seconds.values())


def test_compilation_is_not_running_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes longer to compile than all rounds may last, on a GPU for every new row count."""
    from moe.experts import BACKENDS
    from ops import autotune as room

    compiled: set[tuple[int, ...]] = set()

    def once(*arguments: Any) -> torch.Tensor:
        if not compiled:
            time.sleep(1.2 * room.BUDGET)
            compiled.add(())
        return BACKENDS["loop"](*arguments)

    def per_counts(x: torch.Tensor, counts: list[int], *rest: Any) -> torch.Tensor:
        if tuple(counts) not in compiled:
            compiled.add(tuple(counts))
            time.sleep(0.3)
        return BACKENDS["loop"](x, counts, *rest)

    shapes = room.Shapes(640, 16, 16, 4, "swiglu", True, "float32")
    assert room.measure({"loop": BACKENDS["loop"], "compiled": once}, shapes, torch.device("cpu"))["compiled"] < 0.2
    monkeypatch.setattr(room, "_untimed", lambda device, real=room._untimed: real(torch.device("cuda")))
    slept = time.perf_counter()
    assert room.measure({"compiled": per_counts}, shapes, torch.device("cpu"))["compiled"] < 0.2
    assert time.perf_counter() - slept > 0.3 * room.REPETITIONS


def test_no_two_rounds_have_the_same_rows() -> None:
    """A kernel that oneDNN builds for one row count must cost every round, as it costs every step."""
    from ops import autotune as room

    shapes = room.Shapes(8192, 16, 16, 8, "swiglu", False, "bfloat16")
    rounds = [room._counts(shapes, r) for r in [*room._untimed(torch.device("cpu")), *range(room.REPETITIONS)]]
    assert all(sum(counts) == 8192 and min(counts) > 0 for counts in rounds)
    assert len({n for counts in rounds for n in counts}) > 0.8 * 8 * len(rounds)
