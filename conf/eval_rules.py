"""The rules of evaluation tasks (conf/eval_schema.py)."""

import importlib.util
from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, format_value

INSTALL = "it is not installed: bash launch/setup.sh eval"


def lm_eval_is_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def check_installed() -> None:
    """Raises ValueError with the command that installs lm-eval."""
    if not lm_eval_is_installed():
        raise ValueError(f"tasks need the package lm-eval: {INSTALL}")


def eval_task_rules(cfg: ConfigView) -> Iterator[Violation]:
    tasks = cfg["eval_tasks.tasks"]
    if not tasks:
        return
    without: dict[str, list[object]] = {"eval_tasks.tasks": [[]]}
    if not lm_eval_is_installed():
        yield Violation("eval_tasks.tasks needs the package lm-eval", INSTALL, without)
    if len(set(tasks)) < len(tasks):
        once = list(dict.fromkeys(tasks))
        yield Violation(
            "eval_tasks.tasks names each once", f"it is {format_value(tasks)}", {"eval_tasks.tasks": [once]}
        )
    if cfg["model.moe.num_experts"] > 0 and cfg["model.moe.load_balancing"] == "expert_choice":
        rule = "eval_tasks.tasks needs model.moe.load_balancing other than expert_choice, which looks at later tokens"
        yield Violation(rule, f"there are tasks: {format_value(tasks)}", without)
