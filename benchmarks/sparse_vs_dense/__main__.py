"""Does a sparse model beat a dense one at equal active FLOPs per token? Trains sparse models of growing numbers of
experts, the dense model of the same arithmetic and a dense one of as many parameters, all on the same batches, and says
how many times as many steps the dense one needs to the same loss.

    python -m benchmarks.sparse_vs_dense [--experts 2 4 8] [--seeds N] [--steps N | --minutes N] [SETTING=VALUE ...]

Each run is a complete `python -m launch.train`, kept in --out: started again, the command continues where it was, and
with more experts, seeds or batch sizes it trains only what is missing. On two cores the default takes hours.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.sparse_vs_dense.analysis import analyse
from benchmarks.sparse_vs_dense.corpus import account_of, describe, places, write_corpus
from benchmarks.sparse_vs_dense.inference import compare
from benchmarks.sparse_vs_dense.plot import draw
from benchmarks.sparse_vs_dense.report import text, write_docs
from benchmarks.sparse_vs_dense.runs import (
    DENSE,
    Job,
    Model,
    RunFailed,
    Study,
    affordable_steps,
    check_no_repeats,
    ensure,
    grid,
    machine,
    probe,
    read,
    sparse,
    twin,
    wide,
)
from conf.printable import visible

STEPS = 1000
SETTING = re.compile(r"[a-z_0-9.]+=")
"""The beginning of a setting of all runs, which may stand anywhere among the options."""
BYTES_PER_TOKEN = 5
"""More than a token of code or prose has, so that a corpus of so many bytes is large enough."""
SMALLEST_CORPUS = 8_000_000
"""Bytes. Of a few files neither a tokenizer nor a held-out loss would say much."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m benchmarks.sparse_vs_dense",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="numbers of experts (default: 2 to 64)")
    add("--equal-parameters", type=int, nargs="*", metavar="E", help="numbers of experts for which a dense model of as "
        "many parameters is trained too, at a multiple of the FLOPs (default: the smallest from 8 on)")  # fmt: skip
    add("--seeds", type=int, default=3, help="train.seed = 1, 2, ...: initial weights and batches (default: 3)")
    length = found.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"of every run (default: {STEPS})")
    length.add_argument(
        "--minutes", type=float, help="choose the steps so that all runs take so long, by a few steps of each"
    )
    add("--batch", type=int, nargs="+", default=[16], help="sequences per step, one study each (default: 16)")
    add("--smooth", type=int, help="steps that a training loss is the mean of (default: a twentieth of the steps)")
    add("--at-once", type=int, default=1, help="runs beside each other, which share the cores (default: 1)")
    add("--corpus", help="file of own text (.jsonl, .txt, ...) instead of what the machine carries")
    add("--corpus-mb", type=float, help="size of the corpus that is written (default: enough for the largest batch)")
    add("--out", type=Path, default=Path("runs/sparse_vs_dense"), help="folder of the runs")
    add("--report", action="store_true", help="train nothing: show the runs that are finished")
    add("--inference", action="store_true", help="compare evaluation with the dense model of nearest loss")
    add("--json", action="store_true", help="print one line of JSON after the tables")
    add("--plot", type=Path, metavar="FILE.png", help="draw the losses over steps, FLOPs and seconds")
    add("--write-docs", action="store_true", help="write the tables into docs/sparse_vs_dense.md")
    return found


def chosen_models(args: argparse.Namespace) -> list[Model]:
    """The dense twin first. Raises ValueError for numbers that are none of experts."""
    if wrong := [experts for experts in args.experts if experts < 2]:
        raise ValueError(f"--experts {wrong[0]}: a sparse model has at least 2 experts; nearest: 2")
    equal = args.equal_parameters
    if equal is None:
        equal = [min([experts for experts in args.experts if experts >= 8] or [max(args.experts)])]
    return [
        twin(),
        *(wide(experts, args.overrides) for experts in sorted(set(equal))),
        *(sparse(experts) for experts in sorted(set(args.experts))),
    ]


def _checked(args: argparse.Namespace) -> None:
    """Raises ValueError."""
    for name in ("seeds", "steps", "smooth", "at-once"):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is not a number from 1 on; nearest: --{name} 1")


def chosen_study(args: argparse.Namespace, models: Sequence[Model]) -> Study:
    """The study of --out, its steps and corpus decided if they were not before.

    Raises:
        ValueError: the folder has another study, or the text does not suffice.
    """
    kept, overrides = read(args.out), tuple(args.overrides)
    corpus = Path(args.corpus) if args.corpus else args.out / "corpus.jsonl.gz"
    steps = args.steps or (kept.steps if kept else STEPS)
    if args.minutes and not kept:
        jobs = list(grid(models, args.batch, 1))
        probes = Study(0, "", overrides)
        each = [(*probe(probes, job, args.out), job.batch) for job in jobs]
        steps = affordable_steps(each * args.seeds, 60 * args.minutes * args.at_once)
        _say(f"{args.minutes:g} minutes suffice for {steps} steps of each run")
    if not args.corpus and (kept is None or not corpus.exists()):
        args.out.mkdir(parents=True, exist_ok=True)
        sequence = twin().config(overrides).train.sequence_length
        needed = max(SMALLEST_CORPUS, BYTES_PER_TOKEN * steps * max(args.batch) * sequence)
        _say(describe(write_corpus(corpus, places(), int(1e6 * args.corpus_mb) if args.corpus_mb else needed)))
    study = Study(steps, str(corpus.absolute()), overrides)
    study.check(args.out)
    return study


def _say(message: str) -> None:
    print(visible(message), file=sys.stderr, flush=True)


def train(study: Study, models: Sequence[Model], args: argparse.Namespace) -> None:
    jobs = list(grid(models, args.batch, args.seeds))

    def one(job: Job) -> None:
        rows = ensure(study, job, args.out)
        loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
        seconds = sum(row["step_seconds"] for row in rows if "loss" in row)
        _say(f"{jobs.index(job) + 1} of {len(jobs)}, {job.name}: held-out loss {loss:.4f}, {seconds:.0f} s of steps")

    with ThreadPoolExecutor(args.at_once) as pool:
        waiting = [pool.submit(one, job) for job in jobs]
        try:
            for done in waiting:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def inference(result: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the first batch size and seed. Raises ValueError: no sparse run is finished."""
    batch = args.batch[0]
    found = result["batches"].get(str(batch), {"models": {}})["models"]
    losses = {name: of["held_out_of_seeds"][0] for name, of in found.items() if of["seeds"][0] == 1}
    if DENSE not in losses or all(result["models"][name]["experts"] is None for name in losses):
        raise ValueError(
            f"--inference needs a finished sparse and dense run of seed 1 in {args.out}; nearest: no --report"
        )
    flops = {name: result["models"][name]["flops_per_token"] for name in losses}
    return compare(losses, flops, args.out, batch)


def study_of(args: argparse.Namespace) -> dict[str, Any]:
    """Trains what is missing and returns everything that is printed."""
    _checked(args)
    if args.at_once > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
    models = chosen_models(args)
    if args.report:
        study = read(args.out)
        if study is None:
            raise ValueError(f"--report: {args.out} has no study; nearest: the command without --report")
    else:
        study = chosen_study(args, models)
        tokens = check_no_repeats(study, max(args.batch))
        study.open(args.out)
        _say(f"{tokens['tokens']:,} tokens to train on, of which a run reads {tokens['tokens_of_largest_batch']:,}")
        train(study, models, args)
    result = analyse(study, models, args.batch, args.seeds, args.out, args.smooth or max(1, study.steps // 20))
    account = account_of(Path(study.corpus))
    result["corpus"] = json.loads(account.read_text()) if account.exists() else {"file": study.corpus}
    result["corpus_line"] = describe(result["corpus"]) if account.exists() else f"corpus: {Path(study.corpus).name}"
    result["machine"], result["overrides"] = machine(), list(study.overrides)
    if args.inference:
        result["inference"] = inference(result, args)
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for an argument that does not work, 1 if a run failed."""
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args([word for word in given if not SETTING.match(word)])
    args.overrides = [word for word in given if SETTING.match(word)]
    try:
        result = study_of(args)
        shown = [word for word in given if word not in ("--write-docs", "--report", "--json")]
        result["command"] = shlex.join(["python", "-m", "benchmarks.sparse_vs_dense", *shown])
        if args.plot:
            draw(result, args.plot)
        if args.write_docs:
            write_docs(result)
    except ValueError as error:
        _say(f"switchyard: error: {error}")
        return 2
    except RunFailed as error:
        _say(f"switchyard: error: {error}")
        return 1
    print(visible(text(result)))
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
