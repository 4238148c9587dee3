"""Evaluation tasks during training (eval_tasks.tasks)."""

from training.builder import BuiltModel
from training.console import Console
from training.metrics import RunLog
from training.run_dir import RunDir
from training.storage import StorageFailure


class TrainingTasks:
    """The tasks of a run. Every rank calls every method together. They are loaded at once, so that a task that is not
    there is reported before the first step."""

    def __init__(self, built: BuiltModel, run_dir: RunDir, console: Console, storage: StorageFailure):
        """Raises ValueError: a task cannot be loaded."""
        self._settings, self._console, self._storage = built.config.eval_tasks, console, storage
        self._tasks = None
        if self._settings.tasks:
            from training.eval_tasks import EvalTasks

            self._tasks = EvalTasks(self._settings, built, run_dir.path)

    def due(self, step: int) -> bool:
        """Whether the tasks are evaluated after this step, which is not the last."""
        return self._tasks is not None and self._settings.every > 0 and step % self._settings.every == 0

    def run(self, step: int, log: RunLog | None) -> None:
        """Evaluates the model and logs the results; nothing without tasks.

        Raises:
            ValueError: a task cannot be evaluated with this model.
        """
        results = None if self._tasks is None else self._tasks.run()
        if results is None or log is None:
            return
        from training.eval_tasks import flat

        values = flat(results)
        with self._storage.recording_errors():
            log.tasks(step, values)
        shown = [f"{name} {value:.4f}" for name, value in values.items() if "_stderr" not in name]
        self._console.note(f"step {step}: {', '.join(shown)}")
