"""The bubble of the planner, against schedules that are played through."""

import pytest

from benchmarks.published import composed
from parallel.layout import Layout
from training.planner import report
from training.planner.bubble import bubble, by_schedule
from training.planner.rates import rates_of
from training.planner.search import Options, Plan, search, stage_sizes
from training.planner.step import predict


def one_f_one_b(stages: list[float], micro_batches: int) -> float:
    """Seconds of a step with 1F1B, a third of each time forward: every stage runs its passes in order, each as soon as
    the pass before it on this stage, and that of the same micro-batch next to it, are done."""
    pp = len(stages)
    order = []
    for stage in range(pp):
        warmup = min(pp - 1 - stage, micro_batches)
        passes = [("F", i) for i in range(warmup)]
        for i in range(micro_batches - warmup):
            passes += [("F", warmup + i), ("B", i)]
        order.append(passes + [("B", i) for i in range(micro_batches - warmup, micro_batches)])
    done: dict[tuple[int, str, int], float] = {}
    now, at = [0.0] * pp, [0] * pp
    while any(at[s] < len(order[s]) for s in range(pp)):
        for stage, seconds in enumerate(stages):
            if at[stage] == len(order[stage]):
                continue
            kind, i = order[stage][at[stage]]
            before = (stage - 1, "F", i) if kind == "F" else (stage + 1, "B", i)
            if kind == "B" and stage == pp - 1:
                before = (stage, "F", i)
            if kind == "F" and stage == 0:
                ready = 0.0
            elif before in done:
                ready = done[before]
            else:
                continue
            now[stage] = max(now[stage], ready) + seconds * (1 / 3 if kind == "F" else 2 / 3)
            done[stage, kind, i] = now[stage]
            at[stage] += 1
    return max(now)


@pytest.mark.parametrize("stages", [[1.0] * 4, [1.0, 1.0, 1.0, 1.6], [1.0, 3.0]], ids=str)
def test_a_step_is_what_the_slowest_stage_computes_and_the_bubble(stages: list[float]) -> None:
    for micro_batches in (8, 32):
        played = one_f_one_b(stages, micro_batches)
        assert played == pytest.approx(micro_batches * max(stages) + bubble(stages), rel=1e-9)


def test_the_bubble_is_at_most_that_where_several_stages_are_slowest() -> None:
    stages = [0.1, 1.0, 1.0, 0.4]
    idle = one_f_one_b(stages, 8) - 8 * max(stages)
    assert 0.7 * bubble(stages) < idle < bubble(stages)


def test_bubbles_of_every_schedule_by_hand() -> None:
    """Four stages of 2 s and 8 layers: three idle passes; with two chunks each half of one."""
    assert by_schedule([2.0] * 4, 8) == {"1F1B": 6.0, "interleaved, vpp=2": 3.0}
    assert by_schedule([2.0], 8) == {}


def test_a_plan_shows_the_bubbles() -> None:
    config = composed(["model=qwen3_30b_a3b", "cluster=h100", "train.global_batch_size=256", "parallel.pp=4"])
    prediction = predict(config, Layout(16, pp=4, ep=4), rates_of("h100"))
    assert prediction.bubbles["1F1B"] == prediction.parts["pipeline bubble"] > 0
    line = report.shares(Plan(config, prediction)).splitlines()[-1]
    assert line.startswith("bubble   1F1B ") and "interleaved, vpp=4" in line


def test_the_last_stage_is_tried_with_fewer_layers() -> None:
    assert [*stage_sizes(8, 4)] == [(None, None), (None, [3, 2, 2, 1]), (None, [3, 3, 2, 0]), (2, None)]
    assert next(stage_sizes(61, 16)) == (None, [4] * 13 + [3] * 3)


def test_a_search_finds_them_where_the_output_layer_is_large() -> None:
    """Its product is that of 262144 x 2048 weights, a token's share of a layer that of 67 M."""
    words = ["model=olmoe_1b_7b", "model.vocab_size=262144", "cluster=h100", "train.sequence_length=4096"]
    words += ["train.global_batch_size=512", "train.micro_batch_size=4", "model.recompute=[full]"]
    config = composed(words)
    plans = search(config, rates_of("h100"), Options(16, fixed=frozenset({"model.recompute"})), count=50).plans
    sizes = [layers for plan in plans if (layers := plan.config.parallel.pp_layers)]
    assert sizes and all(layers[-1] < layers[0] for layers in sizes)
