"""`python -m launch.scaling RUN... [plot=scaling.png] [format=json]`: fits power laws of the held-out loss over the
compute, the active parameters and the tokens of finished runs, with 95 % intervals. A directory that contains runs
stands for these."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from conf.printable import visible
from launch.compare import runs_of
from training.compare import summarise
from training.scaling_fit import Point, PowerLaw, draw, fit, points

QUANTITIES = ("compute", "parameters", "tokens")
OPTIONS = ("plot=", "format=")


def main(arguments: list[str]) -> int:
    """Prints the laws. Returns the exit code: 2 if an argument is not a run or the runs do not suffice for a law."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        options = dict(given.split("=", 1) for given in arguments if given.startswith(OPTIONS))
        if (form := options.get("format", "table")) not in ("table", "json"):
            raise ValueError(f"format={form} is not one of table, json; the nearest is format=json")
        paths = [Path(given) for given in arguments if not given.startswith(OPTIONS)]
        found, notes = points([summarise(path) for given in paths for path in runs_of(given)])
        laws = [law for what in QUANTITIES if (law := fit(found, what))]
        for note in notes:
            print(f"switchyard: {visible(note)}", file=sys.stderr)
        if not laws:
            raise ValueError(
                f"a law needs three finished runs that differ in {', '.join(QUANTITIES[:2])} or tokens; "
                f"there are {len(found)} with a held-out loss. Train more sizes: python -m launch.train --multirun "
                "model.num_layers=2,4,8"
            )
        if "plot" in options:
            draw(found, laws, Path(options["plot"]))
        print(_as_json(found, laws) if form == "json" else visible(_table(found, laws)), flush=True)
    except ValueError as error:
        print(f"switchyard: error: {visible(str(error))}", file=sys.stderr)
        return 2
    return 0


def _as_json(found: list[Point], laws: list[PowerLaw]) -> str:
    return json.dumps({"runs": [asdict(point) for point in found], "laws": [asdict(law) for law in laws]})


def _table(found: list[Point], laws: list[PowerLaw]) -> str:
    width = max(len(point.name) for point in found)
    lines = [f"{'run':<{width}}  held-out loss    compute   parameters     tokens"]
    for p in sorted(found, key=lambda point: point.compute):
        lines.append(f"{p.name:<{width}}  {p.loss:>13.4f}  {p.compute:>9.2e}  {p.parameters:>11.3g}  {p.tokens:>9.3g}")
    lines += ["", f"{'loss = (x_c / x)^alpha':<24} {'alpha':>7}   {'95 % interval':<16}  {'10 x of it':<12} runs"]
    for law in laws:
        interval = f"{law.low:.3f} to {law.high:.3f}"
        lower = f"{10**-law.alpha - 1:+.1%} loss"
        lines.append(f"x = {law.what:<20} {law.alpha:>7.3f}   {interval:<16}  {lower:<12} {law.runs:>4}")
    lines.append("Runs that differ in several of these at once mix their effects: vary one, or grow all with compute.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
