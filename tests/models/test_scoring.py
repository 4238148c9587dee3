"""Log-likelihoods of continuations against a softmax in float64 over the logits of single sequences; all layouts."""

from typing import Any

import pytest
import torch

from conf.schema import ParallelConfig
from parallel.env import World
from tests.parallel.helpers import SEQUENCE, VOCABULARY, Variant, build_engine, started

LIMIT = 400.0
VARIANT = Variant(moe={"capacity_factor": 0.5, "eval_capacity_factor": 0.5}, document_mask=True)
LAYOUTS = [(2, {"tp": 2, "sequence_parallel": True}), (2, {"cp": 2}), (2, {"pp": 2, "vpp": 2}), (2, {"ep": 2})]


def requests() -> list[tuple[list[int], int]]:
    """(tokens, number of scored ones), of many lengths; the last one is longer by a label than a sequence."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(2, 1), (9, 3), (5, 4), (12, 1), (7, 6), (SEQUENCE + 1, 5), (SEQUENCE + 1, SEQUENCE)]
    return [(torch.randint(0, VOCABULARY, (size,), generator=generator).tolist(), count) for size, count in sizes]


def scores(world: World, degrees: dict[str, Any]) -> list[Any]:
    """Of batches of one, of three and of more than there are requests; and what they should be (rank function)."""
    from models.logits import sequence_logits
    from models.scoring import score_continuations

    with started(world, ParallelConfig(**degrees)) as runtime:
        engine = build_engine(runtime, VARIANT, None)
        context = [*range(9)]
        likeliest = int(sequence_logits(engine, VOCABULARY, context)[-1].argmax())
        asked = [*requests(), ([*context, likeliest], 1)]
        found: list[Any] = [score_continuations(engine, asked, size) for size in (1, 3, 11)]
        wanted = []
        for ids, count in asked:
            logits_SV = sequence_logits(engine, VOCABULARY, ids[:-1])[-count:].double()
            targets = torch.tensor(ids[-count:])
            log_probs_S = logits_SV.log_softmax(-1).gather(1, targets[:, None])
            wanted.append((log_probs_S.sum().item(), int((logits_SV.argmax(-1) == targets).sum())))
        return [*found, wanted]


@pytest.fixture(scope="module")
def one_rank(ranks) -> list[Any]:
    return ranks.run(1, scores, {}, timeout=LIMIT)[0]


def test_the_size_of_batches_does_not_matter(one_rank):
    *found, wanted = one_rank
    for each in found:
        assert [nats for nats, _ in each] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
        assert [greedy for _, greedy in each] == [greedy for _, greedy in wanted]
    assert wanted[-1][1] == 1 and wanted[0][1] == 0


@pytest.mark.parametrize(("size", "degrees"), LAYOUTS, ids=str)
def test_every_layout_scores_alike(size, degrees, ranks, one_rank):
    for rank in ranks.run(size, scores, degrees, timeout=LIMIT):
        for got, wanted in zip(rank, one_rank, strict=True):
            assert [nats for nats, _ in got] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
            assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
