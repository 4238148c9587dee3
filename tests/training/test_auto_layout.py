"""parallel=auto: the layout for the ranks that there are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conf import rules
from conf.config_view import ConfigView
from conf.schema import ClusterConfig, Config, ModelConfig, MoeConfig, ParallelConfig
from tests.training.helpers import tiny_config
from training.planner.auto import VARIABLE, choose, choose_nodes, resolve
from training.planner.rates import rates_of
from training.planner.search import Options, search

H100 = ClusterConfig("h100", 8, True, 80.0, 14, 450.0, 50.0)


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """2 layers, 4 experts, 12 micro-batches of 2 sequences a step; nothing is known of the machine."""
    config = tiny_config(tmp_path / "text.jsonl", tmp_path / "run", global_batch_size=24)
    return replace(config, parallel=ParallelConfig(auto=True))


def large(**train: int) -> Config:
    """8 B parameters, most of them in experts."""
    model = ModelConfig(
        "large", num_layers=16, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=1024, vocab_size=32000,
        moe=MoeConfig(num_experts=64, top_k=8, every=1),
    )  # fmt: skip
    base = Config(model=model, cluster=H100, parallel=ParallelConfig(auto=True))
    settings = {"sequence_length": 4096, "micro_batch_size": 1, "global_batch_size": 96, **train}
    return replace(base, train=replace(base.train, **settings))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12])
def test_the_batch_and_the_micro_batch_stay(tiny: Config, ranks: int) -> None:
    choice = choose(tiny, ranks, 1)
    rules.check(choice.config, ranks)
    assert choice.config.train == tiny.train and choice.layout.world == ranks
    assert tiny.train.global_batch_size % (tiny.train.micro_batch_size * choice.layout.dp) == 0
    assert choice.config == replace(tiny, parallel=choice.config.parallel), "only the layout is chosen"


def test_without_rates_data_parallelism_comes_first(tiny: Config) -> None:
    assert choose(tiny, 4, 1).layout.describe() == "dp4"
    # Eight replicas do not divide 12 micro-batches. Tensor parallelism stays within a node.
    assert choose(tiny, 8, 8).layout.describe() == "dp4 tp2 +sequence"
    assert choose(tiny, 8, 1).layout.describe() == "dp4 pp2"


def test_a_number_of_ranks_that_divides_nothing(tiny: Config) -> None:
    with pytest.raises(
        ValueError, match=r"no layout of 5 ranks.*numbers of ranks that do: 3, 4, 6, 8; or for 5"
    ) as why:
        choose(tiny, 5, 1)
    suggested = int(str(why.value).rpartition("=")[2])
    for config, ranks in (
        (tiny, 3),
        (tiny, 6),
        (replace(tiny, train=replace(tiny.train, global_batch_size=suggested)), 5),
    ):
        choose(config, ranks, 1)


def test_nodes_that_would_divide_nothing_are_left_out(tiny: Config) -> None:
    nodes, choice, warning = choose_nodes(tiny, 5, 1)
    assert (nodes, choice.layout.world) == (4, 4)
    assert warning is not None and warning.startswith("only 4 of 5 nodes are used: no layout of 5 ranks")
    assert choose_nodes(tiny, 3, 2)[::2] == (3, None)


def test_what_no_layout_can_mend_is_told(tiny: Config) -> None:
    with pytest.raises(ValueError, match=r"model\.moe\.top_k <= model\.moe\.num_experts"):
        choose(replace(tiny, model=replace(tiny.model, moe=MoeConfig(num_experts=4, top_k=5, every=2))), 4, 1)


def test_with_rates_it_is_the_fastest_plan_with_this_micro_batch() -> None:
    config = large()
    choice = choose(config, 16, 8)
    fixed = Options(16, 1.2, fixed=frozenset({"train.micro_batch_size"}))
    plans = search(replace(config, parallel=ParallelConfig()), rates_of("h100"), fixed, 1000).plans
    assert len(plans) > 5 and choice.layout == min(plans, key=lambda plan: plan.prediction.seconds).prediction.layout
    assert choice.config.train == config.train and choice.config.cluster == H100


def test_with_less_memory_it_recomputes_and_with_little_it_does_not_fit() -> None:
    assert choose(large(), 16, 8).config.model.recompute == []
    narrow = replace(large(), cluster=replace(H100, memory_gb=15.0))
    chosen = choose(narrow, 16, 8)
    assert (chosen.config.model.recompute, chosen.config.optim.cpu_offload) == (["moe"], True)
    assert chosen.settings["model.recompute"] == ["moe"] and chosen.settings["optim.cpu_offload"] is True
    tight = replace(large(), cluster=replace(H100, memory_gb=2.0))
    with pytest.raises(ValueError, match="no layout of 16 ranks fits into 2 GB per rank"):
        choose_nodes(tight, 2, 8)


def test_the_memory_of_a_machine_without_rates_counts(tiny: Config) -> None:
    """0.99 MB a rank for four replicas, 0.92 MB with ep=2 (training/memory_estimate.py), of which 95 % are taken."""
    narrow = replace(tiny, cluster=ClusterConfig(memory_gb=0.00100))
    assert choose(narrow, 4, 1).layout.describe() == "dp4 ep2"


def test_ranks_take_what_the_batch_script_has_chosen(tiny: Config) -> None:
    chosen = {"parallel.auto": False, "parallel.ep": 2, "model.recompute": ["norm"]}
    config = resolve(tiny, 4, 1, {VARIABLE: json.dumps(chosen)})
    assert (config.parallel, config.model.recompute) == (ParallelConfig(ep=2), ["norm"])
    assert resolve(tiny, 4, 1, {}).parallel == ParallelConfig()
    given = replace(tiny, parallel=ParallelConfig(tp=2))
    assert resolve(given, 4, 1, {VARIABLE: json.dumps(chosen)}) is given
    # What is passed on is the whole choice.
    choice = choose(tiny, 8, 1)
    assert resolve(tiny, 8, 1, {VARIABLE: json.dumps(choice.settings)}) == choice.config


def test_degrees_beside_auto_are_refused(tiny: Config) -> None:
    both = replace(tiny, parallel=ParallelConfig(auto=True, ep=2))
    with pytest.raises(ValueError, match=r"parallel\.ep needs parallel\.auto=false.*nearest: parallel\.ep=1"):
        resolve(both, 4, 1, {})
    with pytest.raises(ValueError, match=r"parallel\.auto needs training"):
        rules.check_layout(tiny, 1)
    assert not rules.violations(ConfigView(tiny, 1))
