"""Ablation of the measures against instability and overfitting, on small complete runs.

    python -m benchmarks.stability [--group NAME] [--seeds N] [--steps N] [--rates R ...] [--only NAME ...] [--json]

The first group trains on the source of Python's standard library at the lowest of the given learning rates, all far
above the default, at which the model without any measure is unstable: its training loss rises by more than a nat above
its lowest. The second repeats a small text until the model overfits, as in fine-tuning. Each figure is the median of
the seeds and their range; a figure whose distance from that of "as shipped" is within the larger of the two ranges is
marked with ~: it may be chance.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from conf import rules
from conf.schema import Config, DataConfig, EvalConfig, ModelConfig, MoeConfig, OptimConfig, RunConfig, TrainConfig
from corpus.prepare import prepare
from ops.operation import Implementation
from ops.routing import ROUTER_LOGITS
from parallel.env import World
from training.run_dir import open_run_dir
from training.worker import train_rank


@dataclass(frozen=True)
class Variant:
    """A run with changes to the base configuration of its group."""

    changes: dict[str, Any] = field(default_factory=dict)
    low_precision_router: bool = False


STRESSED = {
    "as shipped": Variant(),
    "without z-loss": Variant({"model.moe.z_loss_coeff": 0.0}),
    "without balancing loss": Variant({"model.moe.aux_loss_coeff": 0.0}),
    "router in bf16": Variant(low_precision_router=True),
    "initial weights not reduced": Variant({"model.init_scale": 1.0}),
    "with input jitter 0.01": Variant({"model.moe.jitter": 0.01}),
    "without warm-up": Variant({"optim.warmup_steps": 0}),
    "without clipping": Variant({"optim.clip_grad": 0.0}),
    "without any": Variant(
        {
            "model.moe.z_loss_coeff": 0.0,
            "model.moe.aux_loss_coeff": 0.0,
            "model.init_scale": 1.0,
            "optim.warmup_steps": 0,
            "optim.clip_grad": 0.0,
        },
        low_precision_router=True,
    ),
}
REPEATED = {
    "as shipped": Variant(),
    "expert dropout 0.4": Variant({"model.moe.expert_dropout": 0.4}),
    "without weight decay": Variant({"optim.weight_decay": 0.0}),
}
RATES = (1e-2, 3e-2, 1e-1)
"""Learning rates of the first group: five times the default, and more."""
UNSTABLE = 1.0
"""Nats by which the training loss rises above its lowest, from which on a run counts as unstable. AdamW bounds the
updates: a loss that runs away to infinity, as with SGD, is not to be expected."""


def base(steps: int, seed: int, folder: Path, data: DataConfig, lr: float) -> Config:
    moe = MoeConfig(num_experts=8, every=2)
    return Config(
        model=ModelConfig(num_layers=4, hidden_size=128, ffn_hidden_size=256, vocab_size=2048, moe=moe),
        data=data,
        train=TrainConfig(steps=steps, micro_batch_size=8, global_batch_size=32, sequence_length=128, seed=seed),
        optim=OptimConfig(lr=lr, schedule="constant"),
        eval=EvalConfig(every=max(1, steps // 6), batches=4, sample_tokens=0),
        run=RunConfig(dir=str(folder)),
    )


def changed(config: Config, changes: dict[str, Any]) -> Config:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section: Any = config
        *path, last = key.split(".")
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, last), key
        setattr(section, last, value)
    return config


def small_text(folder: Path) -> DataConfig:
    """A hundred kilobytes that only depend on the version of Python: argparse; optparse is held out."""
    library = Path(sysconfig.get_path("stdlib"))
    names = {"argparse": folder / "argparse.txt", "optparse": folder / "optparse.txt"}
    for name, path in names.items():
        path.write_text((library / f"{name}.py").read_text())
    return DataConfig(kind="text", files=[str(names["argparse"])], valid_files=[str(names["optparse"])])


def run(config: Config, *, low_precision_router: bool) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a complete run."""
    rules.check(config, 1)
    prepared = prepare(config.data, vocab_size=config.model.vocab_size, sequence_length=config.train.sequence_length)
    run_dir = open_run_dir(config)
    run_dir.adopt(config, prepared.tokenizer)
    with _silence(), _router(low_precision_router):
        train_rank(World(), config, run_dir, prepared)
    return [json.loads(line) for line in (run_dir.path / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the output of a run, which writes to the file descriptor and not to sys.stdout."""
    sys.stdout.flush()
    screen, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(screen, 1)
        os.close(screen)
        os.close(nowhere)


@contextlib.contextmanager
def _router(low_precision: bool) -> Iterator[None]:
    def in_bf16(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return (x_TD.bfloat16() @ weight_ED.t().bfloat16()).float()

    if not low_precision:
        yield
        return
    chosen = Implementation("torch", lambda context: in_bf16, "in bf16")
    with mock.patch.multiple(ROUTER_LOGITS, reference=lambda context: chosen, implementations=[]):
        yield


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures by which runs are compared."""
    steps, held_out = (
        [r for r in rows if "loss" in r],
        [float("inf") if r["val_loss"] is None else r["val_loss"] for r in rows if "val_loss" in r],
    )
    losses = [row["loss"] if row["loss"] is not None else float("inf") for row in steps]
    lowest = [min(losses[: i + 1]) for i in range(len(losses))]
    late = steps[len(steps) // 2 :]
    return {
        "held-out": held_out[-1] if held_out else float("inf"),
        "best held-out": min(held_out, default=float("inf")),
        "worst rise": max(loss - low for loss, low in zip(losses, lowest, strict=True)),
        "grad norm": max(row["grad_norm"] or float("inf") for row in late),
        "dropped": statistics.mean(row["dropped_fraction"] for row in late),
        "load": max(row["load_max_over_mean"] for row in late),
        "z": statistics.mean(row["z_loss"] for row in late),
    }


def measure(variant: Variant, steps: int, seed: int, data: DataConfig, lr: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = changed(base(steps, seed, Path(folder) / "run", data, lr), variant.changes)
        return figures(run(config, low_precision_router=variant.low_precision_router))


def compare(variants: dict[str, Variant], steps: int, seeds: int, data: DataConfig, lr: float) -> dict[str, Any]:
    """By variant and figure: see `over_seeds`."""
    found = {
        name: [measure(variant, steps, seed, data, lr) for seed in range(1, seeds + 1)]
        for name, variant in variants.items()
    }
    return over_seeds(found)


def over_seeds(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By variant and figure: the median of the seeds, their range (null for one seed), and whether the distance from
    the median of the first variant is within the larger of both ranges (null for one seed, and for the first)."""
    table: dict[str, Any] = {}
    base_name = next(iter(found))
    for name, runs in found.items():
        table[name] = {}
        for key in runs[0]:
            values = [one[key] for one in runs]
            spread = max(values) - min(values) if len(values) > 1 and max(values) < float("inf") else None
            first = None if name == base_name else table[base_name][key]
            median, within = statistics.median(values), None
            if spread is not None and first is not None and first["range"] is not None:
                within = abs(median - first["median"]) <= max(spread, first["range"])
            table[name][key] = {"median": median, "range": spread, "within_range": within}
    return table


def unstable_rate(rates: Sequence[float], steps: int, data: DataConfig) -> tuple[float, bool]:
    """(the lowest of the rates at which the model without any measure is unstable with the first seed, True), or (the
    highest, False)."""
    for lr in sorted(rates):
        if measure(STRESSED["without any"], steps, 1, data, lr)["worst rise"] > UNSTABLE:
            return lr, True
    return max(rates), False


def show(title: str, table: dict[str, Any]) -> None:
    print(title)
    columns = list(next(iter(table.values())))
    print(f"  {'':28}" + "".join(f"{column:>22}" for column in columns))
    for name, row in table.items():
        cells = []
        for column in columns:
            of = row[column]
            spread = "" if of["range"] is None else f" ({of['range']:.4f})"
            cells.append(f"{'~' if of['within_range'] else ''}{of['median']:.4f}{spread}")
        print(f"  {name:28}" + "".join(f"{cell:>22}" for cell in cells))
    ranged = any(of["range"] is not None for row in table.values() for of in row.values())
    print("  in brackets: range of the seeds; ~: within it, may be chance" if ranged else "  one seed: no range")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--group", choices=("stressed", "repeated"), help="one of the two; both without it")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the first group")
    parser.add_argument("--only", nargs="*", default=[], help="variants; the base is always among them")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, variants, longer in (("stressed", STRESSED, 1), ("repeated", REPEATED, 2)):
            if args.group not in (None, title):
                continue
            if title == "stressed":
                data, (lr, unstable) = DataConfig(), unstable_rate(args.rates, args.steps, DataConfig())
                said = "is unstable" if unstable else "is unstable at none of the rates"
                note = f"stressed: learning rate {lr:g}, the model without any measure {said}"
                result["rate"] = {"lr": lr, "unstable_without_any": unstable}
            else:
                data, lr, note = small_text(Path(folder)), 2e-3, "repeated"
            chosen = {n: v for n, v in variants.items() if not args.only or n in ("as shipped", *args.only)}
            result[title] = compare(chosen, args.steps * longer, args.seeds, data, lr)
            if not args.json:
                show(note, result[title])
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
