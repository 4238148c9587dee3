"""The recipes of CONTRIBUTING.md as they stand there."""

import re
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]


def recipe(heading: str) -> str:
    """The Python code under a heading of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def follow(heading: str) -> SimpleNamespace:
    names: dict[str, object] = {}
    exec(compile(recipe(heading), heading, "exec"), names)
    return SimpleNamespace(**names)
