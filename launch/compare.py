"""`python -m launch.compare RUN...`: a table of runs, with the settings in which they differ. A folder that is no run
but holds some stands for these."""

import os
import sys
from pathlib import Path

from training.compare import comparison, summarise
from training.run_dir import CONFIG


def main(arguments: list[str]) -> int:
    """Prints the table; returns the exit code: 2 when something is not a run."""
    from rich.console import Console

    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        runs = [summarise(path) for given in arguments for path in _runs(Path(given))]
    except ValueError as error:
        print(f"switchyard: error: {error}", file=sys.stderr)
        return 2
    # Into a file or a pipe a row is one line, however long.
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 10_000))
    Console(highlight=False, markup=False, emoji=False, width=width).print(comparison(runs))
    return 0


def _runs(path: Path) -> list[Path]:
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    return inside if inside and not (path / CONFIG).exists() else [path]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
