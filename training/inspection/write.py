"""Writes the page of one run or of two side by side: a single file that needs no network."""

import html
import json
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")


def page(runs: list[dict[str, Any]]) -> str:
    """The page as HTML."""
    # "<" within JSON could end the element that holds it.
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(" and ".join(run["name"] for run in runs))
    return TEMPLATE.read_text().replace("TITLE", title, 1).replace("DATA", data, 1)
