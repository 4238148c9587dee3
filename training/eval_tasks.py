"""Evaluation tasks of lm-eval: finds and loads them, runs them on all ranks, and writes their results."""

import contextlib
import difflib
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from conf.eval_rules import check_installed
from conf.eval_schema import TaskSettings
from corpus.documents import nearest_existing
from corpus.tokenizer_files import companions
from training import noncausal
from training.builder import BuiltModel
from training.hf_runs import origin_of
from training.run_dir import TOKENIZER

BOOTSTRAP = 1000
"""Resamples behind the standard errors of metrics that are no means, such as perplexity. (lm-eval's 100,000 take it
minutes.)"""
FOLDER = "eval_tasks"
"""Of a run directory."""


class EvalTasks:
    """Loaded tasks. Every rank has an instance and calls every method together; rank 0 has the tasks."""

    def __init__(self, settings: TaskSettings, built: BuiltModel, run_dir: Path, *, log_samples: bool = False):
        """Raises ValueError, on every rank: no tokenizer, no lm-eval, no such task, or a task's data are not there."""
        check_installed()
        noncausal.check_can_generate(built.config.model)
        self.settings, self.log_samples, self._built = settings, log_samples, built
        if not (run_dir / TOKENIZER).is_file():
            raise ValueError(f"tasks need a tokenizer, and {run_dir} has no {TOKENIZER}")
        self._manager: Any = None
        self._tokenizer: Any = None
        with self._together():
            if built.runtime.world.rank == 0:
                self._manager = load_tasks(settings)
                self._tokenizer = hf_tokenizer(run_dir, built.config.data.eod_token)
                if settings.apply_chat_template and not self._tokenizer.chat_template:
                    raise ValueError(f"apply_chat_template=true, and the tokenizer of {run_dir} has no chat template")

    @contextlib.contextmanager
    def _together(self) -> Iterator[Any]:
        """On rank 0, context manager for what it does alone, with the model that leads the others; on the others, does
        what the model asks for before the block is run. A ValueError of rank 0 is raised on every rank."""
        from training.harness_ranks import follow

        if self._built.runtime.world.rank != 0:
            if message := follow(self._built):
                raise ValueError(message)
            yield None
            return
        from training.harness_model import HarnessModel

        model = HarnessModel(self._built, self._tokenizer, self.settings.batch_size)
        try:
            yield model
        except ValueError as error:
            model.finish(str(error))
            raise
        model.finish()

    def run(self) -> dict[str, Any] | None:
        """Evaluates the model. Returns lm-eval's results on rank 0, None on the others.

        Raises:
            ValueError: on every rank; a task cannot be evaluated with this model.
        """
        from parallel.random_state import random_state, restore_random_state

        results = None
        with self._together() as model:
            if model is not None:
                before = random_state()  # lm-eval seeds the generators
                try:
                    results = self._evaluate(model)
                finally:
                    restore_random_state(before)
        return results

    def _evaluate(self, model: Any) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        settings, limit = self.settings, self.settings.limit
        with _no_progress_bars():
            found = simple_evaluate(
                model,
                tasks=self._manager.names,
                num_fewshot=settings.num_fewshot,
                limit=int(limit) if limit is not None and limit >= 1 else limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=self.log_samples,
                apply_chat_template=settings.apply_chat_template,
                task_manager=self._manager,
            )
        assert found is not None
        return dict(found)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Context manager: tqdm's bars of lm-eval and datasets are not drawn, unless they are asked for by argument."""
    from tqdm import tqdm

    original: Any = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]


def load_tasks(settings: TaskSettings) -> Any:
    """lm-eval's TaskManager with the tasks loaded.

    Raises:
        ValueError: there is no such task or directory, or a task cannot be loaded, for example because its data set is
            neither cached nor can be downloaded.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork this process, which has threads
    from lm_eval.tasks import TaskManager

    class Loaded(TaskManager):
        """Loads tasks once. simple_evaluate asks a manager to load."""

        names: list[str]
        loaded: Any = None

        def load(self, task_list: Any) -> Any:
            if self.loaded is None:
                self.loaded = super().load(task_list)
            return self.loaded

    include = None if settings.include_path is None else str(Path(settings.include_path).expanduser())
    if include is not None and not Path(include).is_dir():
        nearest = "" if Path(include).exists() else nearest_existing(include)
        raise ValueError(f"include_path={settings.include_path} is not a directory{nearest}")
    manager = Loaded(include_path=include, include_defaults=False)
    names, unknown = _matched(settings.tasks, manager)
    if unknown:
        manager = Loaded(include_path=include)
        names, unknown = _matched(settings.tasks, manager)
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.0)
        unread = "".join(f"; {problem}" for problem in _unreadable(include)) if include is not None else ""
        raise ValueError(f"tasks: lm-eval has no task {unknown[0]}; nearest: {', '.join(near)}{unread}")
    manager.names = names
    try:
        with _no_progress_bars():
            manager.load(names)
    except Exception as error:  # of datasets, huggingface_hub, YAML or a task's own code
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        offline = (
            " (HF_HUB_OFFLINE is set: only cached data sets are found)" if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        raise ValueError(f"tasks: {', '.join(names)} cannot be loaded: {reason}{offline}") from error
    return manager


def _unreadable(folder: str) -> Iterator[str]:
    """What is wrong with the YAML files of a directory, which lm-eval passes over without a word."""
    for path in sorted(Path(folder).glob("**/*.yaml")):
        try:
            for _ in yaml.parse(path.read_text(encoding="utf-8")):
                pass
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            yield f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}"


def _matched(wanted: list[str], manager: Any) -> tuple[list[str], list[str]]:
    """The names that patterns match, and what matches none. A path of a YAML file stands for itself."""
    names, unknown = [], []
    for pattern in wanted:
        is_file = pattern.endswith((".yaml", ".yml")) and Path(pattern).is_file()
        found = [pattern] if is_file else manager.match_tasks([pattern])
        names += found
        if not found:
            unknown.append(pattern)
    return list(dict.fromkeys(names)), unknown


def hf_tokenizer(run_dir: Path, eod_token: str) -> Any:
    """The tokenizer of a run as Transformers loads it from an exported checkpoint."""
    from transformers import AutoTokenizer

    from models.hf.files import companion_files

    origin = origin_of(run_dir.absolute())
    with tempfile.TemporaryDirectory() as folder:
        beside = [path for path in companion_files(origin) if "token" in path.name] if origin else []
        for path in (*beside, run_dir / TOKENIZER, *companions(run_dir / TOKENIZER)):
            shutil.copyfile(path, Path(folder) / path.name)
        if not (settings := Path(folder) / "tokenizer_config.json").exists():
            named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod_token}
            settings.write_text(json.dumps(named))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.name_or_path = str(run_dir)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = eod_token
    return tokenizer


def flat(results: dict[str, Any]) -> dict[str, float]:
    """{"TASK/METRIC": value} of tasks and groups; a metric of a filter is METRIC,FILTER."""
    values = {}
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and name not in ("sample_len", "samples"):
                values[f"{task}/{name.removesuffix(',none')}"] = float(value)
    return values


def table(results: dict[str, Any]) -> str:
    """A line for each task and metric: value, standard error, number of examples in a prompt."""
    shots, lines = results.get("n-shot", {}), [("task", "metric", "value", "stderr", "few-shot")]
    values = flat(results)
    for name, value in values.items():
        task, _, metric = name.rpartition("/")
        if "_stderr" not in metric:
            metric_name, comma, kind = metric.partition(",")
            error = values.get(f"{task}/{metric_name}_stderr{comma}{kind}")
            shown = "" if error is None else f"{error:.4f}"
            lines.append((task, metric, f"{value:.4f}", shown, str(shots.get(task, ""))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(rows)


def write_results(results: dict[str, Any], run_dir: Path, step: int, output: str | None) -> list[Path]:
    """Writes the results as JSON into the run directory, and to `output`. Returns the paths.

    Raises:
        OSError: a file cannot be written.
    """
    from lm_eval.utils import handle_non_serializable

    text = json.dumps({"step": step, **results}, indent=2, default=handle_non_serializable) + "\n"
    name = f"step_{step:08d}_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json"
    paths = [run_dir / FOLDER / name, *([Path(output).expanduser()] if output else [])]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return paths
