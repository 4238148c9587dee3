"""Every layout is the same model with TransformerEngine's layers too (tests.stand_ins.parity has more cells), and so is
a checkpoint."""

from pathlib import Path

import pytest
import torch

from benchmarks.parity import LIMIT
from conf.schema import ParallelConfig
from parallel.checkpoint import Checkpointer
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.parallel.helpers import Variant, build_engine, optimizer_tensors, started, state, train
from tests.stand_ins import installed
from tests.stand_ins.parity import MATRIX, cells

TESTED = [layouts for layouts in MATRIX if layouts.tested]


@pytest.mark.parametrize("layouts", TESTED, ids=lambda layouts: f"{layouts.name}, {layouts.tested}")
def test_a_layout_is_the_same_model(ranks: RankPool, layouts) -> None:
    for name, found in cells(ranks, layouts, layouts.tested.split()):
        assert max(found.values()) <= LIMIT, (name, {k: v for k, v in found.items() if v > LIMIT})


MODEL = {"attention_bias": True, "ffn_bias": True}, {"num_shared_experts": 1, "every": 2}
Trained = tuple[list[tuple[float, float]], dict[str, dict[str, torch.Tensor]]]


def trained(world: World, parallel: ParallelConfig, folder: str, with_it: bool, steps: range) -> Trained:
    """Losses and norms of the steps, after the newest checkpoint if there is one; writes another (rank function)."""
    with installed("transformer_engine"), started(world, parallel) as runtime:
        engine = build_engine(runtime, Variant(*MODEL, transformer_engine=with_it))
        checkpoints = Checkpointer(Path(folder), engine, keep=3)
        if steps.start:
            assert checkpoints.resume(print) is not None
        told = train(engine, steps)
        checkpoints.save(state(steps.stop, world.size))
        return told, optimizer_tensors(engine)


def test_checkpoints_are_the_same_with_and_without_it(ranks: RankPool, tmp_path: Path) -> None:
    """Written with its layers under tp2 with sequence parallelism, continued without them on one rank, and the other
    way round: as one rank without them that was never stopped."""
    sequence = ParallelConfig(tp=2, sequence_parallel=True)
    plain = ParallelConfig()
    alone = ranks.run(1, trained, plain, str(tmp_path / "whole"), False, range(4), timeout=120)[0]
    for number, runs in enumerate((((2, sequence, True), (1, plain, False)), ((1, plain, False), (2, sequence, True)))):
        told, tensors = [], {}
        for (size, parallel, with_it), steps in zip(runs, (range(2), range(2, 4)), strict=True):
            losses, tensors = ranks.run(
                size, trained, parallel, str(tmp_path / str(number)), with_it, steps, timeout=120
            )[0]
            told += losses
        for got, wanted in zip(told, alone[0], strict=True):
            assert got == pytest.approx(wanted, rel=LIMIT)
        assert tensors.keys() == alone[1].keys()
        for kind, wanted in alone[1].items():
            assert tensors[kind].keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(tensors[kind][name], tensor, rtol=1e-4, atol=1e-6)
