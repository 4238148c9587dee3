"""What failures cost, against a simulation of them and Daly's published figures."""

import random
from dataclasses import replace

import pytest

from conf.commands import PlanOptions
from conf.schema import CheckpointConfig, ClusterConfig, Config, LoraConfig, ModelConfig, MoeConfig, OptimConfig
from parallel.layout import Layout
from training.planner.failures import Failures, advise, checkpoint_bytes

MINUTE, HOUR = 60.0, 3600.0


def simulated_time(job: Failures, interval: float, segments: int, seed: int) -> float:
    """Wall time of so many intervals of training, each followed by a checkpoint. A failure, at any moment, costs the
    segment so far and a restart, which may fail too."""
    draw = random.Random(seed)
    now, failure = 0.0, draw.expovariate(1 / job.mtbf)
    for _ in range(segments):
        while now + interval + job.checkpoint > failure:
            now, failure = failure, failure + draw.expovariate(1 / job.mtbf)
            while now + job.restart > failure:
                now, failure = failure, failure + draw.expovariate(1 / job.mtbf)
            now += job.restart
        now += interval + job.checkpoint
    return now


@pytest.mark.parametrize(
    ("hours", "interval"),
    [(3.1, 10 * MINUTE), (3.1, 60 * MINUTE), (0.4, 10 * MINUTE)],
    ids=["often", "seldom", "harsh"],
)
def test_the_time_lost_is_that_of_a_simulation(hours: float, interval: float) -> None:
    job, segments = Failures(hours * HOUR, 12 * MINUTE, 40.0), 400_000
    useful = segments * interval / simulated_time(job, interval, segments, seed=1)
    assert 1 - job.lost(interval) == pytest.approx(useful, rel=5e-3)


def test_the_best_interval_beats_others_in_a_simulation() -> None:
    """With 64 times as much training as between two failures, and the same failures for each interval."""
    job = Failures(3 * HOUR, 10 * MINUTE, 60.0)
    best, train = job.daly(), 3000 * HOUR
    times = [simulated_time(job, best * factor, round(train / (best * factor)), seed=2) for factor in (0.5, 1, 2)]
    assert times[1] < min(times[0], times[2])


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_figures_of_daly(hours: float, minutes: float) -> None:
    """Daly 2006, figures 3 to 5: D = 5 min."""
    assert Failures(hours * HOUR, 10 * MINUTE, 5 * MINUTE).daly() / MINUTE == pytest.approx(minutes, rel=6e-3)


@pytest.mark.parametrize("checkpoint", [1.0, 60.0, 600.0])
def test_no_interval_loses_less_than_the_best(checkpoint: float) -> None:
    job = Failures(2 * HOUR, 300.0, checkpoint)
    least = min(job.lost(checkpoint * 1.02**n) for n in range(-100, 600))
    assert job.lost(job.daly()) == pytest.approx(least, rel=2e-3)
    assert job.young() == pytest.approx(job.daly(), rel=0.25)


def test_a_job_that_never_gets_to_a_checkpoint_loses_everything() -> None:
    assert Failures(60.0, 10.0, 60.0).lost(60_000.0) == 1.0
    assert Failures(60.0, 10.0, 600.0).daly() == 60.0


def test_bytes_of_a_checkpoint() -> None:
    """By hand: weights and two moments in fp32; moments in bf16; of a run of adapters theirs alone."""
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12, vocab_size=32)
    model = replace(model, moe=MoeConfig(num_experts=0), tie_embeddings=False, activation="gelu")
    layer = 4 * 8 * 8 + 2 * 8 * 12 + 2 * 8
    parameters = 2 * layer + 2 * 32 * 8 + 8
    assert checkpoint_bytes(Config(model=model)) == 12 * parameters
    assert checkpoint_bytes(Config(model=model, optim=OptimConfig(state_dtype="bf16"))) == 8 * parameters
    lora = LoraConfig(rank=1, target=["*.attention.out"])
    assert checkpoint_bytes(Config(model=model, lora=lora)) == 12 * 2 * (8 + 8)


def test_advice_follows_from_storage_and_failures() -> None:
    cluster = ClusterConfig("x", ranks_per_node=8, gpus=True, storage_gb_per_s=0.5)
    config, options = Config(cluster=cluster), PlanOptions(gpu_mtbf_hours=8000, restart_minutes=5)
    seconds = checkpoint_bytes(config) / (100 * 0.5e9)
    advice = advise(config, Layout(800), 2.0, options)
    assert advice is not None
    assert (advice.failures.mtbf, advice.failures.checkpoint) == (10 * HOUR, pytest.approx(seconds))
    assert advice.failures.restart == pytest.approx(300 + seconds)
    assert advice.every == max(1, round(advice.failures.daly() / 2.0))
    background = advise(replace(config, checkpoint=CheckpointConfig(asynchronous=True)), Layout(800), 2.0, options)
    assert background is not None and background.failures.checkpoint < seconds / 10
    assert background.failures.restart == pytest.approx(300 + 2 * seconds)
    assert advise(Config(), Layout(8), 2.0, options) is None
