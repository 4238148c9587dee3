"""Optimizers, by the recipe of CONTRIBUTING.md."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf import rules
from conf.schema import (
    Config,
    OptimConfig,
    ParallelConfig,
)
from parallel.checkpoint import Checkpointer
from parallel.checkpoint_manifest import read_manifest
from parallel.distributed_optimizer import Overlap
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from parallel.optimizers import OPTIMIZERS, Optimizer, Update
from parallel.process_groups import Runtime
from tests.extensions.recipes import follow
from tests.parallel.helpers import OPTIM, Variant, build_engine, gradients, my_batches, started, state, train, weights
from training.memory_estimate import memory_per_rank


def lion_of_rank(
    world: World, parallel: ParallelConfig, directory: Path, optim: OptimConfig
) -> list[tuple[float, float]]:
    """Loss and norm of three steps, of which the third is the same from a checkpoint after the second."""
    if "lion" not in OPTIMIZERS:
        follow("An optimizer")
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, Variant(), optim, Overlap.of(parallel, runtime.backend))
        told = train(engine, range(2))
        Checkpointer(directory, engine, keep=1).save(state(2, world.size))
        told += train(engine, range(2, 3))
        engine = build_engine(runtime, Variant(), optim, Overlap.of(parallel, runtime.backend))
        Checkpointer(directory, engine, keep=1).load(directory / "step_00000002")
        assert train(engine, range(2, 3)) == told[2:]
        return told


def test_an_optimizer(runtime: Runtime) -> None:
    """Lion by hand, with the gradients of each step."""
    optim = replace(OPTIM, name="lion", clip_grad=0.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"optim\.name is one of adamw, muon, but lion"):
        rules.check(Config(optim=optim), 1)
    follow("An optimizer")
    rules.check(Config(optim=optim), 1)
    engine = build_engine(runtime, Variant(), optim)
    wanted = weights(engine)
    moments = {name: torch.zeros_like(weight) for name, weight in wanted.items()}
    for step in range(3):
        loss = engine.forward_backward(my_batches(runtime, step), step=step).item()
        for name, gradient in gradients(engine).items():
            decay = 0.1 if wanted[name].dim() > 1 else 0.0
            sign = (optim.beta1 * moments[name] + (1 - optim.beta1) * gradient).sign()
            wanted[name] = (1 - optim.lr * decay) * wanted[name] - optim.lr * sign
            moments[name] = optim.beta2 * moments[name] + (1 - optim.beta2) * gradient
        engine.update(optim.lr, loss=loss)
        for name, weight in weights(engine).items():
            off = ((weight - wanted[name]).abs() > 1e-6).double().mean().item()
            assert off <= 0.01, (step, name)  # a sign of what all but cancels may fall either way
            wanted[name] = weight

    def estimate(optim: OptimConfig) -> float:
        return memory_per_rank(Config(optim=optim), Layout.of(ParallelConfig(), 1), bf16=False).optimizer

    assert estimate(optim) == estimate(OPTIM) / 2


def test_an_optimizer_under_every_layout(ranks: RankPool, tmp_path: Path) -> None:
    """With its checkpoint, in which there is one moment."""
    optim = replace(OPTIM, name="lion")
    layouts = [(ParallelConfig(), 1, optim), (ParallelConfig(tp=2, ep=2), 2, optim)]
    layouts += [(ParallelConfig(ep=2), 2, replace(optim, cpu_offload=True))]
    told = [
        ranks.run(size, lion_of_rank, layout, tmp_path / str(index), asked, timeout=120)[0]
        for index, (layout, size, asked) in enumerate(layouts)
    ]
    for other in told[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(told[0]), rtol=1e-3, atol=0)
    kinds = {key.split(".")[0] for key in read_manifest(tmp_path / "0" / "step_00000002")["tensors"]}
    assert {"weights", "exp_avg"} <= kinds and "exp_avg_sq" not in kinds


def test_optimizers_that_cannot_be_sharded_or_kept() -> None:
    def normalised(block: Update) -> None:
        block.weight.sub_(block.gradient / block.gradient.norm())

    with pytest.raises(ValueError, match="optimizer lars: the update of an element depends on other elements"):
        OPTIMIZERS.add(Optimizer("lars", (), normalised))
    with pytest.raises(ValueError, match="optimizer three: it keeps a, b, c; at most two"):
        OPTIMIZERS.add(Optimizer("three", ("a", "b", "c"), lambda block: None))


def test_a_checkpoint_of_another_optimizer_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    follow("An optimizer")
    engine = build_engine(runtime, Variant())
    train(engine, range(1))
    Checkpointer(tmp_path, engine, keep=1).save(state(1))
    engine = build_engine(runtime, Variant(), replace(OPTIM, name="lion"))
    with pytest.raises(ValueError, match=r"of another optimizer, which keeps exp_avg, exp_avg_sq; optim\.name=lion"):
        Checkpointer(tmp_path, engine, keep=1).load(tmp_path / "step_00000001")
