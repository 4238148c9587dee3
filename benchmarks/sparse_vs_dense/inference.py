"""`python -m benchmarks.sparse_vs_dense.inference RUN [--sequences N]`: tokens per second of evaluating a trained model
on its held-out text, as a line of JSON. The study compares a sparse model with the dense one of nearest loss by it."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement import synchronise
from benchmarks.sparse_vs_dense.runs import EVALUATED, launch

ROUNDS = 3


def measure(run: str, sequences: int) -> float:
    """Tokens per second of the second evaluation; in the first one kernels are chosen and memory is touched."""
    from conf.commands import EvaluateConfig
    from corpus.prepare import prepare
    from corpus.stream import ValidWindows
    from training.evaluate import evaluate
    from training.load_checkpoint import load_model

    with load_model(run, EvaluateConfig(checkpoint=run)) as loaded:
        config = loaded.built.config
        sizes = {"vocab_size": config.model.vocab_size, "sequence_length": config.train.sequence_length}
        windows = ValidWindows(
            prepare(config.data, **sizes),
            sequence_length=config.train.sequence_length,
            document_mask=config.data.document_mask,
        )
        batches = max(1, sequences // config.train.global_batch_size)
        evaluate(loaded.built, windows, None, batches=1)
        synchronise()
        begun = time.perf_counter()
        tokens = evaluate(loaded.built, windows, None, batches=batches).tokens
        synchronise()
        return tokens / (time.perf_counter() - begun)


def nearest(loss: float, dense: dict[str, float]) -> str:
    """The dense model whose loss is nearest."""
    return min(dense, key=lambda name: abs(dense[name] - loss))


def compare(losses: dict[str, float], flops: dict[str, float], folder: Path, batch: int) -> list[dict[str, Any]]:
    """For every sparse model: itself and the dense one of nearest held-out loss, with forward FLOPs per token and
    tokens per second, which alternate.

    Args:
        losses: held-out, by the model's name.
        flops: per token, forward and backward, which takes three times a forward pass.
    """
    dense = {name: loss for name, loss in losses.items() if not name.startswith("e")}
    speeds: dict[str, list[float]] = {name: [] for name in losses}
    pairs = {name: nearest(losses[name], dense) for name in losses if name not in dense}
    for _ in range(ROUNDS):
        for name in dict.fromkeys([*pairs, *pairs.values()]):
            speeds[name].append(tokens_per_second(folder / "runs" / f"{name}-b{batch}-s1"))

    def of(name: str) -> dict[str, Any]:
        forward = {"loss": losses[name], "forward_flops_per_token": flops[name] / 3}
        return forward | {"tokens_per_second": statistics.median(speeds[name])}

    return [
        {"sparse": name, "dense": other, "of_sparse": of(name), "of_dense": of(other)}
        | {"flops_saving": flops[other] / flops[name]}
        | {"speed_ratio": statistics.median(speeds[name]) / statistics.median(speeds[other])}
        for name, other in pairs.items()
    ]


def tokens_per_second(run: Path) -> float:
    """`measure` in a process of its own."""
    path = run.parent / f"{run.name}.speed.json"
    launch([sys.executable, "-m", "benchmarks.sparse_vs_dense.inference", str(run), "--to", str(path)])
    found = json.loads(path.read_text())
    path.unlink()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--sequences", type=int, default=EVALUATED)
    parser.add_argument("--to", help="file for the result; standard output without it")
    args = parser.parse_args(argv)
    found = json.dumps(measure(args.run, args.sequences))
    if args.to:
        Path(args.to).write_text(found)
    else:
        print(found)


if __name__ == "__main__":
    main()
