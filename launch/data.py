"""`python -m launch.data inspect PATH [tokenizer=tokenizer.json] [full=true]`: what is in data, before a run reads it.

It shows the kind of files, how many documents they have, a histogram of their lengths, decoded samples, and problems:
rows without text, invalid UTF-8, damaged files, ids that the tokenizer does not have.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from conf.inspect_data_config import InspectDataConfig
from conf.override_text import override
from corpus import storage
from corpus.documents import expand
from corpus.inspection.report import Report
from corpus.inspection.text import inspect_text
from corpus.inspection.tokens import inspect_tokens, is_token_file
from corpus.objects import explained
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import tokenizer_json
from launch.cli import command
from launch.settings import setting_types
from training.console import Console

_BAR = 40  # columns
_BINS = 16
_SHOWN = 400  # characters of a sample


def main(config: InspectDataConfig) -> int:
    """Prints the report. Returns exit code 0.

    Raises:
        ValueError: no such files, nothing in them can be used, or with `strict` something cannot.
    """
    if config.samples < 0:
        raise ValueError(f"samples >= 0, but it is {config.samples}; nearest: samples=0")
    given = [config.path] if isinstance(config.path, str) else [str(path) for path in config.path]
    pairs = [path for path in given if is_token_file(path)]
    texts = [path for path in given if path not in pairs]
    reports = []
    with Console() as console:
        options: dict[str, Any] = {"full": config.full, "samples": config.samples, "progress": console.progress}
        for path in pairs:
            reports.append((path, inspect_tokens(path, tokenizer=_tokenizer(config, path), **options)))
        if texts:
            tokenizer = _tokenizer(config, None)
            report = inspect_text(expand(texts), text_key=config.text_key, tokenizer=tokenizer, **options)
            reports.append((", ".join(texts), report))
        for name, report in reports:
            for line in lines_of(name, report):
                console.note(line)
    problems = sum(sum(report.problems.counts.values()) for _, report in reports)
    if not any(len(report.lengths) for _, report in reports):
        raise ValueError(f"{', '.join(given)} has no document that can be used")
    if config.strict and problems:
        raise ValueError(f"{', '.join(given)}: {problems:,} problems (strict=true)")
    return 0


def _tokenizer(config: InspectDataConfig, pair: str | None) -> Tokenizer | None:
    path = config.tokenizer
    if path is None and pair is not None:
        beside = f"{pair.removesuffix('.bin').removesuffix('.idx')}.tokenizer.json"
        path = beside if explained(beside, storage.is_file) else None
    if path is None:
        return None
    file = tokenizer_json(path, "tokenizer")
    try:
        return Tokenizer.load(file, config.eod_token)
    except ValueError:
        return Tokenizer.load(file, None)  # raises again unless only the token is missing


def lines_of(name: str, report: Report) -> list[str]:
    """The report as it is printed."""
    found = ["", name]
    if report.part:
        found.append(f"a sample: {report.part}; full=true reads everything")
    found += [f"{what:<12}{value}" for what, value in report.facts]
    found += ["", *histogram(report.lengths, report.unit)]
    for where, text in report.samples:
        more = f" ... ({len(text):,} characters)" if len(text) > _SHOWN else ""
        found += ["", f"{where}:", *(f"  {line}" for line in (text[:_SHOWN] + more).splitlines())]
    problems = report.problems.lines()
    return [*found, "", *(f"problem: {line}" for line in problems)] if problems else [*found, "", "no problems found"]


def histogram(lengths: np.ndarray, unit: str) -> list[str]:
    """Counts of documents whose lengths are between powers of two, or of four and so on where there are many."""
    if not len(lengths):
        return []
    median, most = int(np.median(lengths)), int(lengths.max())
    found = [f"{unit} of a document: median {median:,}, mean {lengths.mean():,.0f}, longest {most:,}"]
    first, last = (int(length).bit_length() for length in (lengths.min(), most))
    power = -(-(last - first + 1) // _BINS)
    edges = [0 if bits == 0 else 1 << (bits - 1) for bits in range(first, last + power + 1, power)]
    counts = np.histogram(lengths, [*edges[:-1], max(edges[-1], most + 1)])[0]
    rows = [(f"{begin:,}", f"{end - 1:,}") for begin, end in itertools.pairwise(edges)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for (begin, end), count in zip(rows, counts.tolist(), strict=True):
        bar = "█" * -(-count * _BAR // max(int(counts.max()), 1))
        found.append(f"  {begin:>{widths[0]}} - {end:>{widths[1]}}  {bar} {count:,}")
    return found


def arguments(words: Sequence[str]) -> list[str]:
    """The command line for Hydra: `inspect PATH` as `path=PATH`. Options come last.

    Raises:
        ValueError: another action than inspect.
    """
    if not words or words[0] != "inspect":
        raise ValueError(f"launch.data has one action, python -m launch.data inspect PATH{_not(words)}")
    settings, paths, overrides = setting_types(InspectDataConfig), [], []
    options = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    for word in words[1:options]:
        (overrides if word.partition("=")[0] in settings else paths).append(word)
    if paths:
        overrides.append(override("path", paths if len(paths) > 1 else paths[0]))
    return [*overrides, *words[options:]]


def _not(words: Sequence[str]) -> str:
    return f", not {words[0]}" if words else ""


if __name__ == "__main__":
    command(InspectDataConfig, "data_inspect", main, arguments)
