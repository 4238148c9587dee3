"""The settings of evaluation tasks (lm-eval), of a training run and of launch.evaluate."""

from dataclasses import dataclass, field

from conf.setting import setting


@dataclass
class TaskSettings:
    """Evaluation tasks of lm-eval (EleutherAI's lm-evaluation-harness): bash launch/setup.sh eval installs it."""

    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval, globs of their names ('mmlu_*'), or paths of YAML files with a task of your
    own. Empty: none."""
    num_fewshot: int | None = setting(None, ge=0)
    """Number of examples in a prompt. null: that of the task."""
    limit: float | None = setting(None, gt=0)
    """Number of samples per task, from 1; below 1: their fraction. null: all of them."""
    apply_chat_template: bool = False
    """Apply the tokenizer's chat template to prompts."""
    include_path: str | None = None
    """Directory with YAML files of further tasks. If all tasks are found there, lm-eval's own are not read, which takes
    seconds. null: lm-eval's own tasks only."""
    batch_size: int = setting(8, ge=1)
    """Sequences per forward pass and data-parallel rank."""


@dataclass
class EvalTasksConfig(TaskSettings):
    """Evaluation tasks of lm-eval during training: bash launch/setup.sh eval installs it. The results are lines of
    metrics.jsonl and go to the loggers."""

    every: int = setting(0, ge=0)
    """Optimizer steps between evaluations on the tasks. 0: only at the end."""
