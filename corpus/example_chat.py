"""Writes a few hundred short conversations that a tiny model can learn, for docs/guides/fine_tuning.md: sums,
opposites, capitals, words in capitals or backwards, and one-line Python functions.

`python -m corpus.example_chat chats.jsonl [conversations]`: the same file every time.
"""

import json
import random
import sys
from collections.abc import Callable

_CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo", "Peru": "Lima"}
_CAPITALS |= {"Egypt": "Cairo", "Cuba": "Havana", "Greece": "Athens", "Kenya": "Nairobi", "Ghana": "Accra"}
_OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "up": "down",
    "old": "new",
    "fast": "slow",
    "open": "closed",
    "day": "night",
}
_WORDS = [
    "file",
    "line",
    "name",
    "path",
    "value",
    "list",
    "key",
    "test",
    "time",
    "code",
    "text",
    "data",
    "index",
    "word",
]
_FUNCTIONS = {"adds": "+", "subtracts": "-", "multiplies": "*", "divides": "/"}
_GREETINGS = {"Hello!": "Hello! How can I help?", "Thank you.": "You are welcome.", "Who are you?": "A small model."}

Turn = tuple[str, str]
"""What the user says, and what the assistant answers."""


def _sum(draw: random.Random) -> Turn:
    a, b = draw.randrange(10), draw.randrange(10)
    return draw.choice([f"What is {a} + {b}?", f"Add {a} and {b}."]), f"{a} + {b} = {a + b}"


def _capital(draw: random.Random) -> Turn:
    country, city = draw.choice(sorted(_CAPITALS.items()))
    question = draw.choice([f"What is the capital of {country}?", f"Name the capital of {country}."])
    return question, f"The capital of {country} is {city}."


def _opposite(draw: random.Random) -> Turn:
    word, other = draw.choice(sorted(_OPPOSITES.items()))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."


def _rewrite(draw: random.Random) -> Turn:
    words = draw.sample(_WORDS, 2)
    if draw.random() < 0.5:
        return f"Write in capitals: {' '.join(words)}", " ".join(words).upper()
    return f"Swap the words: {' '.join(words)}", " ".join(reversed(words))


def _function(draw: random.Random) -> Turn:
    verb, operator = draw.choice(sorted(_FUNCTIONS.items()))
    a, b = draw.sample(["a", "b", "x", "y"], 2)
    return f"Write a function that {verb} {a} and {b}.", f"def {verb[:3]}({a}, {b}):\n    return {a} {operator} {b}"


def _greeting(draw: random.Random) -> Turn:
    return draw.choice(sorted(_GREETINGS.items()))


_TASKS: list[Callable[[random.Random], Turn]] = [_sum, _capital, _opposite, _rewrite, _function, _greeting]


def conversations(count: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Conversations of one to three turns, as rows with `messages`."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            question, answer = draw.choice(_TASKS)(draw)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def main(arguments: list[str]) -> int:
    """Writes the file. Returns exit code 0, or 2 for wrong arguments."""
    if len(arguments) not in (1, 2) or not (count := arguments[1] if len(arguments) == 2 else "600").isdigit():
        print("usage: python -m corpus.example_chat FILE.jsonl [conversations]", file=sys.stderr)
        return 2
    with open(arguments[0], "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(int(count)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
