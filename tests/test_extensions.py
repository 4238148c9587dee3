"""The extension points, by the recipes of CONTRIBUTING.md as they stand there."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf.registry import Registry
from conf.schema import MoeConfig
from moe.metrics import collect
from moe.router_metrics import ROUTER_METRICS, RouterMetric
from parallel.batch_context import ForwardPass
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_layer, sparse_layer, tiny
from training.metrics import RunLog, step_keys

ROOT = Path(__file__).parents[1]
REGISTRIES = {"moe.router_metrics": "ROUTER_METRICS"}


def recipe(heading: str) -> str:
    """The Python code under a heading of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture(autouse=True)
def registries() -> Iterator[list[Registry]]:
    """As they were, after each test."""
    found = [getattr(import_module(module), name) for module, name in REGISTRIES.items()]
    before = [dict(registry) for registry in found]
    yield found
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


def follow(heading: str) -> SimpleNamespace:
    names: dict[str, object] = {}
    exec(compile(recipe(heading), heading, "exec"), names)
    return SimpleNamespace(**names)


def test_a_name_is_added_once(registries: list[Registry]) -> None:
    for registry in registries:
        name, entry = next(iter(registry.items()))
        with pytest.raises(ValueError, match=f"there is a {registry.kind} {name} already"):
            registry.add(entry)


def test_a_router_metric(runtime: Runtime, tmp_path: Path) -> None:
    """Two layers, two micro-batches, of which the second has padding that would be the largest."""
    before = step_keys()
    follow("A router metric")
    moe = MoeConfig(num_experts=4, top_k=2, renormalize=False)
    layers = {index: sparse_layer(tiny(moe), runtime, seed=index) for index in (1, 3)}
    batches = [random(5, 2, 8, seed=seed).to(runtime.device) for seed in (10, 11)]
    batches[1][4] *= 100
    padding_BS = torch.zeros(2, 5, dtype=torch.bool, device=runtime.device)
    padding_BS[:, 4] = True
    gates, logits = [], []
    for layer in layers.values():
        real_TD = torch.cat([batches[0].flatten(0, 1), batches[1][:4].flatten(0, 1)])
        logits_TE = real_TD @ layer.router.weight.T
        gates.append(logits_TE.softmax(1).amax(1).mean().item())
        logits.append(logits_TE.max().item())
        run_layer(layer, batches[0])
        run_layer(layer, batches[1], ForwardPass(padding_BS=padding_BS))
    statistics = {index: layer.statistics for index, layer in layers.items()}
    load = collect(statistics, [1, 3], 4, runtime.layout, 2, runtime.device)
    assert load is not None
    row = load.as_row()
    assert row["router_first_gate"] == pytest.approx(np.mean(gates), rel=1e-5)
    assert row["router_max_logit"] == pytest.approx(max(logits), rel=1e-5)

    added = ["router_first_gate", "router_max_logit"]
    assert [key for key in step_keys() if key not in before] == added
    log = RunLog(tmp_path, warn=pytest.fail)
    log.step(dict.fromkeys(step_keys(), 0.5) | {"step": 1} | row, load)
    log.close()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {key: line[key] for key in added} == {key: row[key] for key in added}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/router_max_logit")[0].value == pytest.approx(max(logits), rel=1e-5)
    assert board.Scalars("moe/layer_03/router_first_gate")[0].value == pytest.approx(gates[1], rel=1e-5)

    again = collect(statistics, [1, 3], 4, runtime.layout, 2, runtime.device)
    assert again is not None and (again.metric("router_max_logit") == -np.inf).all()  # a new interval


def test_a_router_metric_says_what_it_is_computed_from(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="odd: give one of compute and of_load"):
        RouterMetric("odd", "mean")
    ROUTER_METRICS.add(RouterMetric("odd", "mean", lambda layer: layer.routing.logits_TE))
    layer = sparse_layer(tiny(MoeConfig(num_experts=4)), runtime)
    with pytest.raises(ValueError, match=r"router metric odd is \[6, 4\]; give a value of each token, or a scalar"):
        layer(random(3, 2, 8).to(runtime.device))
