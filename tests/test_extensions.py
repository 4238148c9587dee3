"""The extension points, by the recipes of CONTRIBUTING.md as they stand there."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf import extensions, rules
from conf.registry import Registry
from conf.schema import BlendPart, Config, DataConfig, LoggingConfig, ModelConfig, MoeConfig, OptimConfig
from corpus.indexed import token_range
from corpus.prepare import Prepared, prepare
from corpus.sources import SOURCES
from corpus.tokenizer import Tokenizer
from moe.metrics import collect
from moe.router import choose_router
from moe.router_metrics import ROUTER_METRICS, RouterMetric
from moe.score_functions import SCORE_FUNCTIONS, ScoreFunction, Scores
from ops.activations import ACTIVATIONS, Activation
from ops.gemm_backend import Reference
from parallel.batch_context import TRAIN, BatchContext
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import assert_close, assert_gradients_close, in_float64, random, run_layer, sparse_layer, tiny
from training.flops import model_cost
from training.loggers import LOGGERS, Logger, LoggerKind, RunInfo
from training.lr_schedule import SCHEDULES, Schedule, between, learning_rate
from training.metrics import RunLog, step_keys

ROOT = Path(__file__).parents[1]
REGISTRIES = {"moe.router_metrics": "ROUTER_METRICS", **dict(extensions.REGISTRIES.values())}


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


def check(**model: Any) -> None:
    rules.check(Config(model=ModelConfig(**model)), world_size=1)


def test_a_score_function(runtime: Runtime) -> None:
    moe = MoeConfig(num_experts=4, top_k=2, score_function="sqrtsoftplus", routed_scaling_factor=2.0)
    with pytest.raises(ValueError, match="score_function is one of softmax, sigmoid, but sqrtsoftplus"):
        check(moe=moe)
    follow("A router score function")
    check(moe=moe)
    with pytest.raises(ValueError, match="score_function is one of softmax, sigmoid, sqrtsoftplus, but tanh"):
        check(moe=replace(moe, score_function="tanh"))

    layer = sparse_layer(tiny(moe), runtime)
    logits_TE = random(6, 4).to(runtime.device).requires_grad_()
    routing = layer.router.route(logits_TE, None, TRAIN, 1)
    scores_TE = (1 + logits_TE.double().exp()).log().sqrt()
    chosen_TK = scores_TE.topk(2).values
    assert_close(routing.gates_TK, 2 * chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert_close(routing.router_stats.probs_BE[0], (scores_TE / scores_TE.sum(1, keepdim=True)).sum(0))
    (gradient,) = torch.autograd.grad(routing.gates_TK[:, 0].sum(), logits_TE)
    assert_close(gradient, torch.autograd.grad(2 * (chosen_TK[:, 0] / chosen_TK.sum(1)).sum(), logits_TE)[0])

    fused, choice = choose_router(tiny(moe), runtime.groups, torch.device("cuda"))
    assert fused is None and "no sqrtsoftplus scores" in choice.why


def test_a_score_function_that_no_router_can_use() -> None:
    with pytest.raises(ValueError, match="falling: a larger logit does not give a larger score"):
        SCORE_FUNCTIONS.add(ScoreFunction("falling", lambda logits_TE: Scores(-logits_TE, logits_TE.softmax(-1))))
    with pytest.raises(ValueError, match="raw: the probabilities of a token do not add up to 1"):
        SCORE_FUNCTIONS.add(ScoreFunction("raw", lambda logits_TE: Scores(logits_TE.exp(), logits_TE.exp())))


@pytest.mark.parametrize("name", ["mish", "mishglu"])
@pytest.mark.parametrize("backend", ["loop", "fused", "grouped_mm", "reference"])
def test_an_activation(name: str, backend: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sparse layer with a shared expert, which is a dense layer, and with an empty expert."""
    moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, num_shared_experts=1)
    with pytest.raises(ValueError, match=f"activation is one of swiglu, geglu, gelu, relu, relu2, but {name}"):
        check(activation=name)
    follow("An activation")
    check(activation=name)

    model = tiny(moe, activation=name, hidden_size=16, ffn_hidden_size=24)
    layer = sparse_layer(model, runtime, backend=Reference() if backend == "reference" else backend)
    x_SBD = random(9, 2, 16).to(runtime.device).requires_grad_()
    out_SBD = run_layer(layer, x_SBD)
    above_SBD = random(9, 2, 16, seed=1).to(runtime.device)
    out_SBD.backward(above_SBD)

    weights = in_float64(layer)
    exact_SBD = x_SBD.detach().cpu().double().requires_grad_()
    monkeypatch.setattr(reference, "gelu", lambda h: h * torch.tanh(torch.log(1 + torch.exp(h))))
    like = {"mish": "gelu", "mishglu": "geglu"}[name]
    wanted = reference.sparse_layer(exact_SBD.flatten(0, 1), weights, moe, like, None)
    assert_close(out_SBD, wanted.out_TD.view(9, 2, 16))
    losses = moe.aux_loss_coeff * wanted.aux_loss + moe.z_loss_coeff * wanted.z_loss
    ((wanted.out_TD.view(9, 2, 16) * above_SBD.cpu()).sum() + losses).backward()
    assert_close(x_SBD.grad, exact_SBD.grad)
    assert_gradients_close(layer, weights)

    ungated = model_cost(replace(model, activation="relu"), 16)
    extra = 5 * 16 * 24 * model.num_layers if name == "mishglu" else 0  # of four experts and the shared one
    assert model_cost(model, 16).total == ungated.total + extra


def test_a_gradient_of_another_function() -> None:
    with pytest.raises(ValueError, match="activation odd: its gradient is not that of the function"):
        ACTIVATIONS.add(Activation("odd", False, torch.tanh, lambda grad, h: grad))


def test_a_schedule() -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=4, schedule="inverse_sqrt")
    with pytest.raises(ValueError, match=r"schedule is one of cosine, linear, wsd, constant, but inverse_sqrt"):
        rules.check(Config(optim=optim), 1)
    follow("A learning-rate schedule")
    rules.check(Config(optim=optim), 1)
    assert [learning_rate(step, optim, 100) for step in (2, 4, 16, 64)] == [0.25, 0.5, 0.25, 0.125]
    for setting in ({"min_lr": 0.1}, {"decay_fraction": 0.3}):
        (name,) = setting
        with pytest.raises(ValueError, match=rf"optim\.{name} needs .* would be ignored"):
            rules.check(Config(optim=replace(optim, **setting)), 1)
    SCHEDULES.add(Schedule("half", lambda step, optim, steps: between(optim, 0.5), reads=("min_lr", "decay_fraction")))
    halved = replace(optim, schedule="half", min_lr=0.1, decay_fraction=0.3)
    rules.check(Config(optim=halved), 1)
    assert learning_rate(9, halved, 100) == pytest.approx(0.3)


def test_a_data_source(tmp_path: Path) -> None:
    """Alone, held out by name, in a blend; the reader's version is a part of the cache's key."""
    words = [f"{number} green bottles hanging on the wall, " * 9 for number in range(60)]
    for name, rows in (("a", words[:50]), ("b", words[50:])):
        (tmp_path / f"{name}.csv").write_text("id,review\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)))
    data = DataConfig(
        kind="csv", files=[f"{tmp_path}/*.csv"], text_key="review", valid_fraction=0.3, cache_dir=f"{tmp_path}/cache"
    )
    with pytest.raises(ValueError, match=r"data\.kind is one of stdlib, text, megatron, blend, but csv"):
        rules.check(Config(data=data), 1)
    follow("A data source")
    rules.check(Config(data=data), 1)
    with pytest.raises(ValueError, match=r"data=csv needs data\.files"):
        rules.check(Config(data=replace(data, files=[])), 1)

    def texts(data: DataConfig) -> tuple[Prepared, list[str], list[str]]:
        prepared = prepare(data, vocab_size=300, sequence_length=16)
        tokenizer = Tokenizer.load(str(prepared.tokenizer), data.eod_token)
        splits = []
        for split in (prepared.train, prepared.valid):
            ranges = [token_range(source.prefix, source.first_document, source.num_documents) for source in split]
            tokens = [token for ids in ranges for token in ids.tolist()]
            splits.append(tokenizer.decode(tokens).split(data.eod_token)[:-1])
        return prepared, *splits

    _, train, valid = texts(data)
    assert sorted(train + valid) == sorted(words) and 5 < len(valid) < 40
    _, train, valid = texts(replace(data, files=[f"{tmp_path}/a.csv"], valid_files=[f"{tmp_path}/b.csv"]))
    assert (train, valid) == (words[:50], words[50:])
    parts = [BlendPart(kind="csv", files=[f"{tmp_path}/a.csv"]), BlendPart(kind="csv", files=[f"{tmp_path}/b.csv"])]
    blend = replace(data, kind="blend", files=[], blend=parts)
    rules.check(Config(data=blend), 1)
    assert len(texts(blend)[0].train) == 2

    SOURCES["csv"] = replace(SOURCES["csv"], read=lambda path, key: iter(["other " * 400] * 9), version=1)
    assert set(texts(replace(data, valid_fraction=0.5, valid_files=[f"{tmp_path}/b.csv"]))[1]) == {"other " * 400}


def logged(tmp_path: Path, loggers: list[str], warn: Callable[[str], None] = pytest.fail, restored: int = 0) -> None:
    """A step and an evaluation."""
    settings = {"train": {"steps": 3}}
    log = RunLog(tmp_path, warn=warn, loggers=loggers, settings=settings, restored_step=restored)
    log.step(dict.fromkeys(step_keys(), 0.5) | {"step": restored + 1})
    log.evaluation({"step": restored + 1, "val_loss": 2.5, "val_bits_per_byte": None})
    log.close()


def test_a_logger(tmp_path: Path) -> None:
    wanted = Config(logging=LoggingConfig(["tensorboard", "csv"]))
    with pytest.raises(ValueError, match=r"logging.loggers is made of tensorboard, wandb, mlflow, but it is .*csv"):
        rules.check(wanted, 1)
    follow("A logger")
    rules.check(wanted, 1)
    logged(tmp_path, wanted.logging.loggers)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "1,train/loss,0.5" in rows and rows[-1] == "1,eval/loss,2.5"
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("eval/loss")[0].value == 2.5


@pytest.mark.parametrize("where", ["open", "scalars", "close"])
def test_a_logger_that_fails_ends_no_run(where: str, tmp_path: Path) -> None:
    class Failing(Logger):
        def __init__(self, run: RunInfo) -> None:
            self.fail("open")

        def fail(self, at: str) -> None:
            if at == where:
                raise RuntimeError("no connection")

        def scalars(self, step: int, values: object) -> None:
            self.fail("scalars")

        def close(self) -> None:
            self.fail("close")

    LOGGERS.add(LoggerKind("failing", Failing, label="the tracker's figures"))
    warnings: list[str] = []
    logged(tmp_path, ["failing", "tensorboard"], warn=warnings.append)
    assert warnings == [
        "the tracker's figures cannot be written any more (no connection): the run goes on without them"
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("eval/loss")[0].value == 2.5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "absent") else find(name))
    with pytest.raises(ValueError, match=r"loggers=wandb needs the package wandb, but it is not installed: bash"):
        rules.check(Config(logging=LoggingConfig(["wandb"])), 1)
    LOGGERS.add(LoggerKind("mine", lambda run: Logger(), label="rows", package="absent"))
    with pytest.raises(ValueError, match=r"loggers=mine needs the package absent, but it is not installed; nearest"):
        rules.check(Config(logging=LoggingConfig(["tensorboard", "mine"])), 1)


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by the package itself where it is installed; what it wrote is read back."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    logged(tmp_path, ["wandb"])
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content, at, found = file.read_bytes(), 7, {}
    while at < len(content):  # LevelDB's log format: checksum, length, type, data
        end = at + 7 + int.from_bytes(content[at + 4 : at + 6], "little")
        record = wandb_internal_pb2.Record.FromString(content[at + 7 : end])
        found |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        at = end
    assert found["eval/loss"] == 2.5 and found["train/loss"] == 0.5 and found["_step"] == 1


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files, by the package itself where it is installed; a continued run is one run."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    for restored in (0, 1):
        logged(tmp_path, ["mlflow"], restored=restored)
    client = MlflowClient((tmp_path / "mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("switchyard")
    (run,) = client.search_runs([experiment.experiment_id])
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history == [(1, 0.5), (2, 0.5)] and run.data.metrics["eval/loss"] == 2.5
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name


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
        run_layer(layer, batches[1], BatchContext(padding_BS=padding_BS))
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
