"""`python -m benchmarks.synthetic_preferences FILE`: preferences between answers to small sums, for the worked example
of docs/preferences.md. The right sum is preferred to a wrong one; with --responses 4, further from it is worse."""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any


def rows(count: int, responses: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `chosen` and `rejected`, or with more than two responses in rank order."""
    drawn, made = random.Random(seed), []
    for _ in range(count):
        a, b = drawn.randrange(50), drawn.randrange(50)
        errors = [0, *sorted(drawn.sample(range(1, 20), responses - 1))]
        answers = [f"The sum is {a + b + error}." for error in errors]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}]}
        if responses == 2:
            row |= {
                name: [{"role": "assistant", "content": answer}]
                for name, answer in zip(("chosen", "rejected"), answers, strict=True)
            }
        else:
            row["responses"] = [[{"role": "assistant", "content": answer}] for answer in answers]
        made.append(row)
    return made


def write(path: Path, count: int, responses: int = 2, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, responses, seed)))
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic_preferences", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--responses", type=int, default=2)
    given = parser.parse_args(arguments)
    write(given.file, given.count, given.responses)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
