"""The runs of the study: which models, their commands, and a folder that keeps what is done."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.published import composed
from conf.schema import Config
from training.flops import Cost, model_cost
from training.run_files import METRICS, json_lines, json_object, write_atomically

EVALUATIONS, EVALUATED = 10, 256
"""Of a run: evaluations on held-out text, and the sequences of each."""
CHECKPOINTS = 5
PROBE_STEPS = 6
STEADY = ["optim.schedule=constant"]
"""What differs from the recipe of the presets. With a decay, the loss of a step depends on how many are to come, and no
model could be compared with another at an earlier step."""
DENSE = "dense"


class RunFailed(RuntimeError):
    """A training run ended with an error; the message has its output."""


@dataclass(frozen=True)
class Model:
    name: str
    overrides: tuple[str, ...]
    experts: int | None = None
    """None: dense."""

    def config(self, overrides: Sequence[str] = ()) -> Config:
        return _composed((*STEADY, *overrides, *self.overrides))

    def cost(self, overrides: Sequence[str] = ()) -> Cost:
        config = self.config(overrides)
        return model_cost(config.model, config.train.sequence_length)


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return composed(list(overrides))


def sparse(experts: int) -> Model:
    overrides = ("model=tiny_switch", f"model.moe.num_experts={experts}", "model.moe.top_k=1")
    return Model(f"e{experts}", overrides, experts)


def twin() -> Model:
    """As many FLOPs per token as the sparse models, but for their routers'."""
    return Model(DENSE, ("model=tiny_dense",))


def wide(experts: int, overrides: Sequence[str] = ()) -> Model:
    """The dense model whose feed-forward layers are so wide that it has as many parameters as a sparse one."""
    base = twin()
    width = base.config(overrides).model.ffn_hidden_size
    per_unit = base.cost([*overrides, f"model.ffn_hidden_size={width + 1}"]).total - base.cost(overrides).total
    missing = sparse(experts).cost(overrides).total - base.cost(overrides).total
    chosen = max(8, 8 * round((width + missing / per_unit) / 8))
    return Model(f"wide{experts}", ("model=tiny_dense", f"model.ffn_hidden_size={chosen}"))


@dataclass(frozen=True)
class Job:
    """A run."""

    model: Model
    batch: int
    """Sequences per step."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model.name}-b{self.batch}-s{self.seed}"


def grid(models: Sequence[Model], batches: Sequence[int], seeds: int) -> Iterator[Job]:
    """Every model on a seed's batches before the next seed, so that a study that is stopped has whole comparisons."""
    for seed in range(1, seeds + 1):
        for batch in batches:
            yield from (Job(model, batch, seed) for model in models)


@dataclass(frozen=True)
class Study:
    """What all runs of a folder have in common. A folder can get more experts, batches and seeds later, not others of
    these."""

    steps: int
    corpus: str
    """Path of the text, or empty: the standard library."""
    overrides: tuple[str, ...] = ()
    """Settings of all runs, by the user."""

    def check(self, folder: Path) -> None:
        """Raises ValueError: the folder has runs of a study with other settings."""
        kept = read(folder)
        if kept is not None and kept != self:
            mine, theirs = asdict(self), asdict(kept)
            differing = [f"{key} {theirs[key]!r}, not {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
            raise ValueError(f"--out {folder} has runs with {'; '.join(differing)}. Nearest: another --out")

    def open(self, folder: Path) -> None:
        """Makes the folder one of this study. Raises ValueError as `check`."""
        self.check(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "study.json", json.dumps(asdict(self), indent=1).encode())

    def command(self, job: Job, run_dir: Path, steps: int | None = None) -> list[str]:
        steps = self.steps if steps is None else steps
        data = ["data=text", f'data.files=["{self.corpus}"]'] if self.corpus else ["data=stdlib"]
        evaluated = max(1, EVALUATED // job.batch)
        defaults = [f"eval.every={max(1, steps // EVALUATIONS)}", f"eval.batches={evaluated}"]
        # The final evaluation is on the same text as the others, so that all of them are points of one curve.
        defaults += [f"eval.final_batches={evaluated}", "eval.sample_tokens=0", "logging.loggers=[]", *STEADY]
        defaults += [f"checkpoint.every={-(-steps // CHECKPOINTS)}", "checkpoint.keep=1"]
        fixed = [f"train.steps={steps}", f"train.global_batch_size={job.batch}", f"train.seed={job.seed}"]
        fixed += [*data, f"run.dir={run_dir}"]
        # The model's own settings come last: a width for all does not change that of the wider dense one.
        return [sys.executable, "-m", "launch.train", *defaults, *self.overrides, *job.model.overrides, *fixed]


def read(folder: Path) -> Study | None:
    """The study that a folder has runs of."""
    path = folder / "study.json"
    kept = json_object(path.read_bytes()) if path.exists() else None
    if kept is None:
        return None
    return Study(kept["steps"], kept["corpus"], tuple(kept["overrides"]))


def rows_of(run_dir: Path, steps: int) -> list[dict[str, Any]] | None:
    """The rows of metrics.jsonl of a finished run; None: it is not finished."""
    rows = json_lines(run_dir / METRICS)
    last = [row["step"] for row in rows if "loss" in row][-1:]
    evaluated = [row["step"] for row in rows if "val_loss" in row][-1:]
    return rows if last == evaluated == [steps] else None


def ensure(study: Study, job: Job, folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, which is trained unless it is finished; one that was interrupted continues at its checkpoint.
    Weights are kept of the first seed alone, for the comparison of inference.

    Raises:
        RunFailed: the training ended with an error.
    """
    run_dir = folder / "runs" / job.name
    rows = rows_of(run_dir, study.steps)
    if rows is None:
        launch(study.command(job, run_dir))
        rows = rows_of(run_dir, study.steps)
        if rows is None:
            raise RunFailed(f"{run_dir} ended before step {study.steps}: start the command again to continue it")
    if job.seed > 1:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return rows


def launch(command: list[str]) -> float:
    """Runs a command. Returns its seconds. Raises RunFailed with its output."""
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RunFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - begun


def probe(study: Study, job: Job, folder: Path) -> tuple[float, float]:
    """(seconds of a step, seconds of everything else but evaluations) of a model, from a few steps on the standard
    library."""
    path = folder / "probes" / f"{job.model.name}-b{job.batch}.json"
    if not path.exists():
        run_dir = folder / "probes" / job.name
        shutil.rmtree(run_dir, ignore_errors=True)
        only_last = [f"{what}.every={PROBE_STEPS}" for what in ("eval", "checkpoint")]
        only_last += ["eval.batches=1", "eval.final_batches=1"]
        short = Study(PROBE_STEPS, "", (*study.overrides, *only_last))
        whole = launch(short.command(job, run_dir))
        steps = [row["step_seconds"] for row in json_lines(run_dir / METRICS) if "loss" in row]
        write_atomically(path, json.dumps([statistics.median(steps[2:]), whole - sum(steps)]).encode())
        shutil.rmtree(run_dir)
    step, rest = json.loads(path.read_text())
    return step, rest


def affordable_steps(probed: Sequence[tuple[float, float, int]], seconds: float) -> int:
    """Steps of each run for all of them to take so long.

    Args:
        probed: of each run, as `probe` returns them: seconds of a step and of the rest, and its batch.

    Raises:
        ValueError: the time does not suffice for EVALUATIONS steps each.
    """
    forward = 1 / 3  # of a step
    evaluations = [EVALUATIONS * max(1, EVALUATED // batch) * forward * step for step, _, batch in probed]
    fixed = sum(rest for _, rest, _ in probed) + sum(evaluations)
    per_step = sum(step for step, _, _ in probed)
    steps = int((seconds - fixed) / per_step)
    if steps < EVALUATIONS:
        least = -(-(fixed + EVALUATIONS * per_step) // 60)
        raise ValueError(
            f"{seconds / 60:.4g} minutes are too few for {len(probed)} runs; nearest: --minutes {least:.0f}, or fewer "
            "--experts, --batch or --seeds"
        )
    return steps // 10 * 10


@cache
def training_tokens(corpus: str, config_overrides: tuple[str, ...]) -> int:
    """Tokens of a corpus that are trained on; tokenises it into the cache of the runs."""
    from corpus.prepare import prepare

    config = composed(["model=tiny_dense", "data=text", f'data.files=["{corpus}"]', *config_overrides])
    sizes = {"vocab_size": config.model.vocab_size, "sequence_length": config.train.sequence_length}
    return sum(source.num_tokens for source in prepare(config.data, **sizes).train)


def check_no_repeats(study: Study, batch: int) -> dict[str, int]:
    """Raises ValueError: a run would read a text twice."""
    sequence = twin().config(study.overrides).train.sequence_length
    needed = study.steps * batch * sequence
    available = training_tokens(study.corpus, study.overrides)
    if needed > available:
        steps = available // (batch * sequence)
        raise ValueError(
            f"{study.steps} steps of {batch} sequences are {needed:,} tokens, but {study.corpus} has {available:,} to "
            f"train on, and none is to be repeated; nearest: --steps {steps}, or a larger --corpus-mb"
        )
    return {"tokens": available, "tokens_of_largest_batch": needed}


def machine() -> str:
    """What the seconds were measured on."""
    import platform

    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} cores, "
    return (
        f"{device}{'' if torch.cuda.is_available() else (names or [platform.machine()])[0]}, torch {torch.__version__}"
    )
