"""`python -m benchmarks.synthetic_preferences FILE`: preferences between answers to small sums, for the worked example
of docs/guides/preferences.md. An answer with the sum is better than one that guesses, and that better than none."""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

RANKED = (
    ("The sum is {sum}.", "{a} + {b} = {sum}."),
    ("I think it is {sum}.", "It may be {sum}."),
    ("I do not know.", "I cannot add numbers."),
    ("Why do you ask?", "Ask somebody else."),
)
"""Answers by rank, the best first."""


def rows(count: int, responses: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `chosen` and `rejected`, or with up to four responses in rank order."""
    drawn, made = random.Random(seed), []
    for _ in range(count):
        a, b = drawn.randrange(50), drawn.randrange(50)
        ranks = sorted(drawn.sample(range(len(RANKED)), responses))
        answers = [drawn.choice(RANKED[rank]).format(a=a, b=b, sum=a + b) for rank in ranks]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}]}
        if responses == 2:
            named = zip(("chosen", "rejected"), answers, strict=True)
            row |= {name: [{"role": "assistant", "content": answer}] for name, answer in named}
        else:
            row["responses"] = answers
        made.append(row)
    return made


def write(path: Path, count: int, responses: int = 2, seed: int = 0) -> Path:
    """Writes a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, responses, seed)))
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic_preferences", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--responses", type=int, default=2, choices=(2, 3, 4))
    given = parser.parse_args(arguments)
    write(given.file, given.count, given.responses)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
