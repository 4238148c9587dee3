"""`python -m launch.compare RUN... [format=json]`: a table of runs and of the settings in which they differ, as wide as
the terminal (or COLUMNS). A directory that contains runs stands for these. format=json prints a list of objects."""

import os
import shutil
import sys
from pathlib import Path

from conf.printable import visible
from training.compare import as_json, comparison, summarise
from training.output_redirect import discard_output
from training.run_dir import CONFIG


def main(arguments: list[str]) -> int:
    """Prints the table. Returns the exit code: 2 if an argument is not a run, 1 if standard output cannot be
    written."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    formats = [given.removeprefix("format=") for given in arguments if given.startswith("format=")]
    try:
        if unknown := [name for name in formats if name not in ("table", "json")]:
            raise ValueError(f"format={unknown[0]} is not one of table, json; the nearest is format=json")
        paths = [Path(given) for given in arguments if not given.startswith("format=")]
        runs = [summarise(path) for given in paths for path in runs_of(given)]
        if not runs:
            raise ValueError("no run is given: python -m launch.compare RUN...")
    except ValueError as error:
        print(f"switchyard: error: {visible(str(error))}", file=sys.stderr)
        return 2
    # In a file or a pipe, a row is a single line of any length.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    try:
        print(as_json(runs) if formats[-1:] == ["json"] else visible(comparison(runs, width)), flush=True)
    except OSError as error:
        discard_output(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            print(f"switchyard: error: standard output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def runs_of(path: Path) -> list[Path]:
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    return inside if inside and not (path / CONFIG).exists() else [path]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
