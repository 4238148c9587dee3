"""Where the figures of a run go besides metrics.jsonl: TensorBoard, and what logging.loggers asks for."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.registry import Registry
from training.event_file import EventFile

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """The run that a logger is opened for."""

    path: Path
    """The run directory."""
    restored_step: int
    """The step that the run continues from: what was logged of later ones is logged again. 0: from the beginning."""
    settings: Mapping[str, Any]
    """Every setting, nested as in config.yaml."""


class Logger:
    """Gets the figures on rank 0. It may raise anything: the run then warns once and goes on without it."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Tag -> value, all of one step. Tags are paths such as train/loss, eval/loss and moe/layer_01/entropy."""
        raise NotImplementedError

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """picture: uint8 [height, width, 3]."""

    def layout(self, charts: Mapping[str, Mapping[str, str]]) -> None:
        """Charts of several series each: category -> title -> regular expression of the tags."""

    def close(self) -> None:
        """After the last figure."""


@dataclass(frozen=True)
class LoggerKind:
    """A value of logging.loggers."""

    name: str
    open: Callable[[RunInfo], Logger | EventFile]
    label: str
    """What messages call it, in the plural: TensorBoard's files."""
    package: str | None = None
    """What has to be importable; None: nothing that is optional."""


class WandbLogger(Logger):
    """A run of Weights & Biases. WANDB_MODE=offline writes into the run directory what `wandb sync` uploads later;
    further settings are wandb's own variables, such as WANDB_PROJECT and WANDB_ENTITY. A run that is continued keeps
    its identity; of steps that are taken again, wandb keeps the first figures."""

    def __init__(self, run: RunInfo):
        import wandb

        where = str(run.path.resolve())
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "switchyard"),
            dir=where,
            id=f"{run.path.name[:40]}-{hashlib.sha256(where.encode()).hexdigest()[:8]}",
            name=run.path.name,
            resume="allow",
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off", disable_code=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        self._run.log({tag: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger(Logger):
    """A run of MLflow, in MLFLOW_TRACKING_URI, else in files under mlflow/ of the run directory; of the experiment
    MLFLOW_EXPERIMENT_NAME. A run that is continued goes on in the same MLflow run."""

    _METRICS_AT_ONCE = 1000  # the most that log_batch takes

    def __init__(self, run: RunInfo):
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        kept, self._metric = run.path / "mlflow_run_id", Metric
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its alternative, SQLite, needs far more packages
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (run.path / "mlflow").resolve().as_uri())
        if kept.exists():
            self._id = kept.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "switchyard")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=run.path.name).info.run_id
        self._client.log_dict(self._id, dict(run.settings), "config.yaml")
        kept.write_text(f"{self._id}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, float(value), now, step) for tag, value in values.items()]
        for first in range(0, len(metrics), self._METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[first : first + self._METRICS_AT_ONCE])

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        self._client.log_image(self._id, picture, artifact_file=f"{tag}/step_{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


LOGGERS = Registry(
    "logger",
    LoggerKind(
        "tensorboard",
        lambda run: EventFile(run.path / "tensorboard", purge_step=run.restored_step + 1),
        "TensorBoard's files",
    ),
    LoggerKind("wandb", WandbLogger, "Weights & Biases' figures", package="wandb"),
    LoggerKind("mlflow", MlflowLogger, "MLflow's figures", package="mlflow"),
)


class Loggers:
    """Those of logging.loggers. One that raises anything is left out from then on: no run has to end for it."""

    def __init__(self, names: Sequence[str], run: RunInfo, warn: Callable[[str], None]):
        """warn: is told once of each that fails."""
        self._warn = warn
        self._open: dict[str, Logger | EventFile] = {}
        for name in names:
            with self._errors(name):
                self._open[name] = LOGGERS[name].open(run)

    def each(self, action: Callable[[Logger | EventFile], None]) -> None:
        """action(logger), of every one that works."""
        for name, logger in list(self._open.items()):
            with self._errors(name):
                action(logger)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            label = LOGGERS[name].label
            _LOG.exception(label)
            self._warn(f"{label} cannot be written any more ({error}): the run goes on without them")
