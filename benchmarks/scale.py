"""What a rank costs in a world of any size: its start, its steps beside the model's own work, a checkpoint.

    python -m benchmarks.scale [--worlds N ...] [--json]

Each world runs in a process of its own: rank 0 of that world, which is real, while the other ranks do what it does
(benchmarks/mirror_world.py). The layout is tp2 pp2 ep2 in every world, so that only the data-parallel groups grow, and
the model is tiny: what grows with the world is not the model's. docs/scale.md says how each figure is counted.
"""

import argparse
import json
import platform
from typing import Any

from benchmarks.scale_rank import figures
from parallel.local_launcher import run_ranks

WORLDS = (8, 64, 512, 4096, 16384)
_TIMEOUT = 3600.0
"""Seconds for one world."""


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or value.is_integer() else f"{value:,.{3 if value < 1 else 1}f}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown, a column per world."""
    lines = [f"| figure | {' | '.join(f'{int(world):,}' for world in rows)} |", f"|---|{'---:|' * len(rows)}"]
    for name in next(iter(rows.values())):
        values = [row[name] for row in rows.values()]
        shown = [_shown(value) for value in values]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, metavar="N", help="ranks, multiples of 8")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON in the last line")
    given = parser.parse_args()
    if wrong := [world for world in given.worlds if world < 8 or world % 8]:
        parser.error(f"--worlds {' '.join(map(str, wrong))}: a world of tp2 pp2 ep2 has a multiple of 8 ranks")
    rows = {str(world): run_ranks(1, figures, world, timeout=_TIMEOUT)[0] for world in given.worlds}
    print(f"{processor()}, one thread\n")
    print(table(rows))
    if given.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
