"""launch.plan's predictions: against peaks and times measured on a GPU, and by hand-made cases."""

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.published import ROWS, composed, predicted
from conf import rules
from conf.schema import ClusterConfig, Config
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from training.memory_estimate import micro_batches_in_flight, stage_parameters, stages_of
from training.planner import report, scaling_laws
from training.planner.links import LATENCY, LINK_EFFICIENCY, NETWORK_EFFICIENCY, NETWORK_LATENCY, Links
from training.planner.rates import interpolated, rates_of
from training.planner.search import Options, search
from training.planner.step import predict
from training.planner.work import exposed

SMALL = "optim.grad_dtype=bf16 optim.state_dtype=bf16"
LONG = "train.sequence_length=4096 train.micro_batch_size=2 train.global_batch_size=4"
MEASURED = {
    # docs/speed.md, whole models on one H200: (seconds of a step, peak in 1e9 bytes)
    f"model=olmoe_1b_7b {LONG} {SMALL}": (0.5759, 108.5),
    f"model=olmoe_1b_7b {LONG} {SMALL} precision=fp8": (0.5791, 114.0),
    f"model=qwen3_30b_a3b model.num_layers=6 {LONG}": (0.3016, 90.49),
    f"model=qwen3_30b_a3b model.num_layers=6 {LONG} model.recompute=[norm,activation]": (0.3082, 88.88),
    f"model=mixtral_8x7b model.num_layers=3 {LONG} {SMALL}": (0.3382, 65.15),
    "model=switch_base_8 train.sequence_length=512 train.micro_batch_size=32 train.global_batch_size=64": (0.233, 14.0),
}


@pytest.mark.parametrize(("overrides", "found"), MEASURED.items(), ids=lambda x: str(x)[:45])
def test_one_h200_takes_what_is_predicted(overrides: str, found: tuple[float, float]) -> None:
    got = predict(composed([*overrides.split(), "cluster=h200"]), Layout(1), rates_of("h200"))
    assert got.seconds == pytest.approx(found[0], rel=0.2)
    assert got.memory.total / 1e9 == pytest.approx(found[1], rel=0.02)
    assert sum(got.parts.values()) == pytest.approx(got.seconds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_steps_are_near(row: Any) -> None:
    """Other trainers' steps: time within 20 %, or why not, and memory within 10 %."""
    seconds, memory = predicted(row)
    near = seconds == pytest.approx(row.published_seconds(), rel=0.2)
    assert near == (not row.why_missed)
    assert row.peak_gb is None or memory / 1e9 == pytest.approx(row.peak_gb, rel=0.1)


def schedule(pp: int, vpp: int, stage: int, micro_batches: int) -> float:
    """The largest number of chunk activations that a stage of Megatron-Core's interleaved 1F1B keeps, by playing it
    through, in stages."""
    chunks = micro_batches * vpp
    warmup = min(chunks, 2 * (pp - 1 - stage) + (vpp - 1) * pp if vpp > 1 else pp - 1 - stage)
    kept = largest = 0
    for step in range(chunks):
        kept += 1
        largest = max(largest, kept)
        kept -= step >= warmup
    return largest / vpp


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 8), (8, 4)])
def test_in_flight_micro_batches_of_every_stage(pp: int, vpp: int) -> None:
    layout = Layout(pp, pp=pp, vpp=vpp)
    for stage in range(pp):
        for micro_batches in (pp, 4 * pp):
            wanted = schedule(pp, vpp, stage, micro_batches)
            assert micro_batches_in_flight(layout, stage, micro_batches) == wanted, (stage, micro_batches)


def test_a_rate_is_constant_in_time_below_the_first_point() -> None:
    curve = [(4.0, 10.0), (16.0, 30.0)]
    assert [interpolated(curve, x) for x in (1, 2, 4, 8, 16, 99)] == [2.5, 5.0, 10.0, 20.0, 30.0, 30.0]


def test_collectives_by_hand() -> None:
    cluster = ClusterConfig("x", ranks_per_node=8, gpus=True, link_gb_per_s=400.0, network_gb_per_s=50.0)
    links = Links(Layout(64, tp=4, pp=2, ep=16), cluster)
    link, network = 400e9 * LINK_EFFICIENCY, 50e9 * NETWORK_EFFICIENCY
    assert links.ring("tp", 1e9) == pytest.approx(0.75 * 1e9 / link + LATENCY)
    # dp 8, two ranks of a group in each node of 8: their two interfaces carry the ring.
    assert links.ring("dp_cp", 1e9) == pytest.approx(7 / 8 * 1e9 / (2 * network) + NETWORK_LATENCY)
    # 8 of 16 in the own node: half of what is sent crosses the network.
    assert links.all_to_all("ep", 1e9) == pytest.approx(0.5 * 1e9 / network + NETWORK_LATENCY)
    # Two nodes, eight experts each: nearly every token visits the other node, once.
    wanted = (1 - 0.5**8) * 1000 * 4096 / network
    assert links.dispatch(1000, 8, 4096) == pytest.approx(wanted + NETWORK_LATENCY)
    assert links.ring("cp", 1e9) == links.ring("etp", 1e9) == 0


@pytest.mark.parametrize(
    ("way", "experts", "parts", "wanted"),
    [(16, 16, 1, 32), (16, 16, 4, 16), (16, 8, 4, 24), (16, 64, 4, 8), (16, 64, 2, 16)],
)
def test_experts_hide_rows_that_travel_in_parts(way: float, experts: float, parts: int, wanted: float) -> None:
    """The cases of tests/moe/test_overlap.py, without what is computed."""
    assert exposed(way, experts, parts) == wanted


QWEN = ["model=qwen3_30b_a3b", "cluster=h100", "train.sequence_length=4096", "train.global_batch_size=256"]


@pytest.fixture(scope="module")
def qwen() -> Config:
    return composed(QWEN)


def test_plans_are_valid_fit_and_come_fastest_first(qwen: Config) -> None:
    found = search(qwen, rates_of("h100"), Options(16))
    seconds = [plan.prediction.seconds for plan in found.plans]
    assert len(seconds) == 5 and seconds == sorted(seconds)
    for plan in found.plans:
        rules.check(plan.config, 16)
        assert plan.prediction.memory.total < 80e9
        again = composed([*QWEN, *plan.override().split()])
        assert predict(again, Layout.of(again.parallel, 16), rates_of("h100")).seconds == plan.prediction.seconds


def test_no_layout_that_was_left_out_is_faster(qwen: Config) -> None:
    """All of the same kind, by brute force."""
    best = search(qwen, rates_of("h100"), Options(16)).plans[0].prediction.seconds
    for tp in (1, 2, 4):
        for pp in (1, 2, 4):
            for ep in (1, 2, 4, 8, 16):
                for micro in (1, 2, 4, 8):
                    for recompute in ([], ["moe"], ["full"]):
                        parallel = replace(qwen.parallel, tp=tp, pp=pp, ep=ep, sequence_parallel=tp > 1)
                        train = replace(qwen.train, micro_batch_size=micro)
                        model = replace(qwen.model, recompute=recompute)
                        config = replace(qwen, parallel=parallel, train=train, model=model)
                        if 16 % (tp * pp) or 16 % (ep * pp) or 256 % (micro * 16 // (tp * pp)):
                            continue
                        got = predict(config, Layout.of(parallel, 16), rates_of("h100"))
                        assert got.memory_bytes > 0.95 * 80e9 or got.seconds >= best


def test_memory_first_takes_less(qwen: Config) -> None:
    fast, small = (search(qwen, rates_of("h100"), Options(16, by_memory=m)).plans[0] for m in (False, True))
    assert small.prediction.memory.total < fast.prediction.memory.total
    assert small.prediction.seconds > fast.prediction.seconds


def test_given_settings_are_kept(qwen: Config) -> None:
    given = replace(qwen, parallel=replace(qwen.parallel, ep=8, pp=2))
    fixed = frozenset({"parallel", "train.micro_batch_size", "model.recompute", "optim.cpu_offload"})
    given.train = replace(given.train, micro_batch_size=1)
    given.model = replace(given.model, recompute=["full"])
    (plan,) = search(given, rates_of("h100"), Options(16, fixed=fixed)).plans
    assert plan.config == given


def test_imbalance_costs_time_and_memory(qwen: Config) -> None:
    layout = Layout(16, ep=8)
    even, uneven = (predict(qwen, layout, rates_of("h100"), imbalance=i) for i in (1.0, 1.5))
    assert uneven.parts["experts"] > 1.3 * even.parts["experts"]
    assert uneven.memory.activations > 1.2 * even.memory.activations


@pytest.mark.parametrize(("layout", "dense", "experts"), [(Layout(1), 1, 1), (Layout(16, ep=8), 16, 2)], ids=str)
def test_muon_takes_its_products(layout: Layout, dense: int, experts: int) -> None:
    """By hand: 16 layers with four matrices of 2048 x 2048, and 64 experts with three of 1024 x 2048."""
    rates = rates_of("h100")
    adamw, muon = (
        predict(composed(["model=olmoe_1b_7b", f"optim.name={n}"]), layout, rates) for n in ("adamw", "muon")
    )
    square, wide = (5 * (2 * rates.dense(r, 2048, r) + rates.dense(r, r, r)) for r in (2048, 1024))
    wanted = 16 * 4 * square / dense + 16 * 64 / layout.ep * 3 * wide / experts
    assert muon.parts["optimizer"] - adamw.parts["optimizer"] == pytest.approx(wanted)
    assert muon.memory.optimizer < 0.68 * adamw.memory.optimizer


def test_json_adds_up(qwen: Config) -> None:
    found = search(qwen, rates_of("h100"), Options(16))
    plans = json.loads(report.as_json(found.plans))["plans"]
    assert [set(plan) for plan in plans] == [set(plans[0])] * 5
    for plan in plans:
        assert sum(plan["parts"].values()) == pytest.approx(plan["step_seconds"], rel=1e-2)
        assert sum(plan["memory_parts"].values()) == pytest.approx(plan["memory_gb"], rel=1e-2)
        rate = 256 * 4096 / plan["step_seconds"] / 16
        assert plan["tokens_per_second_per_gpu"] == pytest.approx(rate, rel=1e-2)
        assert plan["mfu"] == pytest.approx(plan["tflops_per_gpu"] / 989.5, rel=1e-2)


def test_a_plan_says_what_it_loses(qwen: Config) -> None:
    plans = search(qwen, rates_of("h100"), Options(16)).plans
    slower = replace(plans[1], prediction=replace(plans[1].prediction, parts=Counter({"experts": 100.0})))
    assert report.why(slower, plans[0]).startswith("experts +")


def test_stages_that_differ_are_all_looked_at() -> None:
    config = composed(["model=tiny_switch", "model.num_layers=8", "model.moe.first_dense_layers=4"])
    found = stages_of(config.model, Layout(4, pp=4))
    assert [(s.index, s.sparse, s.dense, s.is_first, s.is_last) for s in found] == [
        (0, 0, 2, True, False), (1, 0, 2, False, False), (2, 1, 1, False, False), (3, 1, 1, False, True),
    ]  # fmt: skip


def test_scaling_laws_spend_the_budget() -> None:
    """And ten times as much compute as the papers say."""
    growth = {}
    for law in scaling_laws.LAWS:
        n, d = law.optimum(1e21)
        assert 6 * n * d == pytest.approx(1e21, rel=1e-6)
        growth[law.name] = [b / a for a, b in zip((n, d), law.optimum(1e22), strict=True)]
    assert growth["Kaplan"] == pytest.approx([5.37, 1.86], rel=0.01)
    assert growth["Chinchilla"] == pytest.approx([math.sqrt(10)] * 2)
    # Chinchilla: 5.76e23 FLOPs, 70 B parameters and 1.4 T tokens.
    n, d = scaling_laws.CHINCHILLA.optimum(5.76e23)
    assert (n, d) == (pytest.approx(70e9, rel=0.02), pytest.approx(1.4e12, rel=0.02))


def held_by_ranks(world: World, config: Config, layout: Layout, ranks: list[int]) -> list[int]:
    """Numbers of parameters that some ranks of a world hold, of the model itself on meta tensors (rank function)."""
    import torch

    from models.decoder import ModelBuildContext, ModelChunk
    from models.megatron_config import transformer_config
    from parallel.local_launcher import fake_rank

    found = []
    for rank in ranks:
        with fake_rank(layout, rank) as runtime:
            core = transformer_config(config.model, runtime, torch.bfloat16, deterministic=False)
            context = ModelBuildContext(config.model, core, runtime, seed=1)
            chunks = [
                ModelChunk(context, chunk=chunk, sequence_length=64, document_mask=False) for chunk in range(layout.vpp)
            ]
            weights = [p for chunk in chunks for p in chunk.parameters() if not p.sharding.is_state]
            found.append(sum(p.numel() for p in weights))
    return found


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("qwen3_30b_a3b model.num_layers=16", Layout(64, tp=2, pp=4, ep=8, sequence_parallel=True)),
        ("mixtral_8x7b", Layout(64, tp=2, pp=4, vpp=4, ep=8, etp=2)),
        ("olmoe_1b_7b", Layout(16, pp=2, ep=8)),
        ("olmoe_1b_7b model.mtp_num_layers=2", Layout(16, tp=2, pp=2, ep=4)),
        ("tiny_switch model.num_layers=8 model.mtp_num_layers=1 model.tie_embeddings=true", Layout(4, pp=4)),
        ("tiny_switch model.num_layers=8 model.moe.first_dense_layers=2", Layout(8, tp=2, pp=4)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_parameters_are_those_of_the_model(preset: str, layout: Layout, ranks: RankPool) -> None:
    config = composed([f"model={preset.split()[0]}", *preset.split()[1:]])
    stages = stages_of(config.model, layout)
    first = [stage.index * layout.world // layout.pp for stage in stages]
    found = ranks.run(1, held_by_ranks, config, layout, first, timeout=120)[0]
    assert found == [sum(stage_parameters(config.model, layout, stage)) for stage in stages]


# Krajewski et al. 2024 (arXiv:2402.07871), table 2: active parameters, tokens, granularity, FLOPs, loss.
FINE_GRAINED = [
    (100e6, 4.37e9, 8, 2.95e18, 3.133),
    (1e9, 28.94e9, 16, 1.93e20, 2.491),
    (3e9, 72.9e9, 16, 1.41e21, 2.245),
    (7e9, 137.6e9, 32, 6.46e21, 2.076),
    (70e9, 941.07e9, 32, 4.16e23, 1.694),
    (300e9, 2.96e12, 64, 5.69e24, 1.503),
    (1e12, 7.94e12, 64, 4.97e25, 1.367),
]


@pytest.mark.parametrize(("active", "tokens", "granularity", "compute", "loss"), FINE_GRAINED)
def test_fine_grained_optima_are_the_papers(
    active: float, tokens: float, granularity: int, compute: float, loss: float
) -> None:
    """As near as its rounded coefficients allow."""
    got = scaling_laws.fine_grained(compute)
    assert got.active == pytest.approx(active, rel=0.04) and got.tokens == pytest.approx(tokens, rel=0.04)
    assert got.granularity == granularity and got.loss == pytest.approx(loss, rel=0.01)
    assert got.total == pytest.approx(516 / 12 * got.active)
