"""`python -m launch.compare RUN... [format=json] [plot=FILE.png [smooth=N]]`: a table of runs and of the settings in
which they differ, as wide as the terminal (or COLUMNS). A directory that contains runs stands for these. format=json
prints a list of objects. plot= draws the losses over steps, tokens, seconds and FLOPs, each point the mean of N logged
steps (default 10)."""

import os
import shutil
import sys
from pathlib import Path

from conf.printable import visible
from training.compare import as_json, comparison, summarise
from training.output_redirect import discard_output
from training.run_dir import CONFIG

OPTIONS = ("format=", "plot=", "smooth=")


def main(arguments: list[str]) -> int:
    """Prints the table. Returns the exit code: 2 if an argument is not a run, 1 if standard output cannot be
    written."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    options = dict(given.split("=", 1) for given in arguments if given.startswith(OPTIONS))
    try:
        form = _checked(options)
        paths = [Path(given) for given in arguments if not given.startswith(OPTIONS)]
        runs = [summarise(path) for given in paths for path in runs_of(given)]
        if not runs:
            raise ValueError("no run is given: python -m launch.compare RUN...")
        if "plot" in options:
            from training.loss_plot import draw

            draw(runs, Path(options["plot"]), int(options.get("smooth", 10)))
    except ValueError as error:
        print(f"switchyard: error: {visible(str(error))}", file=sys.stderr)
        return 2
    # In a file or a pipe, a row is a single line of any length.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    try:
        print(as_json(runs) if form == "json" else visible(comparison(runs, width)), flush=True)
    except OSError as error:
        discard_output(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            print(f"switchyard: error: standard output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _checked(options: dict[str, str]) -> str:
    """The format. Raises ValueError for a value that is none of an option's."""
    if (form := options.get("format", "table")) not in ("table", "json"):
        raise ValueError(f"format={form} is not one of table, json; the nearest is format=json")
    if not (smooth := options.get("smooth", "1")).isdecimal() or int(smooth) < 1:
        raise ValueError(f"smooth={smooth} is not a number of steps, 1 or more; nearest: smooth=10")
    return form


def runs_of(path: Path) -> list[Path]:
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    return inside if inside and not (path / CONFIG).exists() else [path]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
