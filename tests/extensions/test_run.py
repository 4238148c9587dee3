"""Schedules, data sources and loggers, by the recipes of CONTRIBUTING.md."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf import extensions, rules
from conf.schema import (
    BlendPart,
    Config,
    DataConfig,
    LoggingConfig,
    OptimConfig,
)
from corpus.prepare import Prepared, prepare
from corpus.sources import SOURCES
from corpus.tokenizer import Tokenizer
from moe.router_metrics import ROUTER_METRICS, RouterMetric
from tests.corpus.helpers import token_range
from tests.extensions.recipes import follow
from training.loggers import LOGGERS, Logger, LoggerKind, RunInfo
from training.lr_schedule import SCHEDULES, Schedule, between, learning_rate
from training.metrics import RunLog, check_router_metrics, step_keys


def logged(tmp_path: Path, loggers: list[str], warn: Callable[[str], None] = pytest.fail, restored: int = 0) -> None:
    """A step and an evaluation."""
    settings = {"train": {"steps": 3}}
    log = RunLog(tmp_path, warn=warn, loggers=loggers, settings=settings, restored_step=restored)
    log.step(dict.fromkeys(step_keys(), 0.5) | {"step": restored + 1})
    log.evaluation({"step": restored + 1, "val_loss": 2.5, "val_bits_per_byte": None})
    log.close()


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
    with pytest.raises(ValueError, match="learning-rate schedule odd: reads names minimum_lr; it takes min_lr and"):
        SCHEDULES.add(Schedule("odd", lambda step, optim, steps: optim.lr, reads=("minimum_lr",)))
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
    with pytest.raises(ValueError, match=r"data\.kind is one of stdlib, text, .*, but csv"):
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


def test_a_logger(tmp_path: Path) -> None:
    wanted = Config(logging=LoggingConfig(["tensorboard", "csv"]))
    with pytest.raises(
        ValueError, match=r"logging.loggers is made of .* mlflow, but csv is not available, and extensions=\[\] does"
    ):
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


@pytest.mark.parametrize(
    "code, wanted",
    [
        (
            "from training.lr_schedule import SCHEDULES\nSCHEDULES.add(SCHEDULES['wsd'])",
            r"\.py, line 2: ValueError: there is a learning-rate schedule wsd already; give this one another name$",
        ),
        ("import no_such_package", r"\.py, line 1: ModuleNotFoundError: No module named 'no_such_package'$"),
        (None, "No module named 'EXTENSION'; a module is named as in an import statement, and lies in"),
    ],
    ids=["clash", "dependency", "missing"],
)
def test_an_extension_that_cannot_be_imported(
    code: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"extension_{tmp_path.name.strip('_')}"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=f"extensions: {name} cannot be imported: .*{wanted.replace('EXTENSION', name)}"
    ):
        extensions.import_extensions([name])


def test_a_router_metric_with_the_name_of_another_key() -> None:
    check_router_metrics()
    ROUTER_METRICS.add(RouterMetric("loss", "mean", lambda layer: layer.aux_loss))
    with pytest.raises(ValueError, match=r"router metric loss: metrics\.jsonl has another key loss; give"):
        check_router_metrics()
