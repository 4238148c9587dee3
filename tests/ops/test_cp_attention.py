"""Attention that context-parallel ranks compute together, with the stand-in for TransformerEngine."""

from typing import Any

import pytest
import torch

from conf.schema import DataConfig, MoeConfig, ParallelConfig
from ops.cp_attention import CP_ATTENTION
from ops.cp_exchange import Lengths, exchange
from ops.registry import largest_difference
from ops.te_attention import TeCpAttention
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.moe.helpers import run_context, selected, tiny, try_on
from tests.parallel.helpers import started
from tests.stand_ins import installed
from tests.stand_ins.versions import as_version


def exchanged(world: World, documents: Lengths) -> tuple[list[int], bool, bool]:
    """The tokens that a rank gets of sequences of 1, 2, ... and 101, 102, ..., and whether they come back, and so do
    gradients (rank function)."""
    with started(world, ParallelConfig(cp=world.size)) as runtime:
        group, size = runtime.groups.cp, sum(documents[0]) // world.size
        plan = exchange(documents, group.rank(), world.size, runtime.device)
        x_SBHN = torch.arange(1, 1 + size)[:, None] + size * group.rank() + 100 * torch.arange(len(documents))
        x_SBHN = x_SBHN.float()[..., None, None].requires_grad_()
        y_THN = plan.there(x_SBHN, group)
        (gradient,) = torch.autograd.grad((y_THN * y_THN.detach()).sum(), x_SBHN)
        back = plan.back(y_THN, x_SBHN, group)
        return y_THN.flatten().int().tolist(), torch.equal(back, x_SBHN), torch.equal(gradient, x_SBHN)


BY_HAND: list[tuple[Lengths, list[list[int]]]] = [
    (((8,),), [[1, 2, 7, 8], [3, 4, 5, 6]]),
    (((12,),), [[1, 2, 11, 12], [3, 4, 9, 10], [5, 6, 7, 8]]),
    (((6, 2), (8,)), [[1, 2, 0, 0, 7, 0, 101, 102, 107, 108], [3, 4, 5, 6, 8, 0, 103, 104, 105, 106]]),
    (((1, 7),), [[1, 0, 2, 3, 8, 0], [0, 0, 4, 5, 6, 7]]),
]
"""The lengths of documents, and each rank's tokens in the order of Megatron-LM's get_batch_on_this_cp_rank; 0: padding
of a document to a multiple of twice the ranks."""


@pytest.mark.parametrize(("documents", "tokens"), BY_HAND, ids=str)
def test_parts_of_documents_are_exchanged_and_come_back(
    ranks: RankPool, documents: Lengths, tokens: list[list[int]]
) -> None:
    for mine, found in zip(tokens, ranks.run(len(tokens), exchanged, documents, timeout=120), strict=True):
        assert found == (mine, True, True)


def differences(world: World, model: dict[str, Any], comm_type: str, documents: bool, wrong: bool) -> list[float]:
    """Of the trial from the reference, with the calls of each recorded version, in fp32 (rank function)."""
    found = []
    parallel = ParallelConfig(cp=world.size, cp_comm_type=comm_type)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, **model}
    with installed("transformer_engine"), started(world, parallel) as runtime:
        data = DataConfig(document_mask=documents)
        context = run_context(tiny(MoeConfig(), **sizes), runtime, torch.float32, parallel=parallel, data=data)
        assert context.exchanges_sequence and not context.needs_varlen
        wanted = CP_ATTENTION.trial(None, context)
        for version in ("2.9.0", "2.18.0"):
            with as_version("transformer_engine", version) as called:
                attend = TeCpAttention(runtime.groups.cp, comm_type)
                attend = (lambda *args, of=attend: of(*args) * 1.05) if wrong else attend
                found.append(largest_difference(CP_ATTENTION.trial(attend, context), wanted))
            assert any(name.endswith("set_context_parallel_group") for name in called)
    return found


KINDS = [
    ({}, "p2p", False),
    ({}, "p2p", True),
    ({"attention_chunk_size": 9, "full_attention_every": 2}, "p2p", False),
    ({"sliding_window": 9, "attention_sinks": True}, "a2a", False),
    ({"sliding_window": 9, "full_attention_every": 2}, "a2a", True),
]


@pytest.mark.parametrize(("model", "comm_type", "documents"), KINDS, ids=str)
def test_it_equals_attention_with_the_whole_sequence(
    ranks: RankPool, model: dict[str, Any], comm_type: str, documents: bool
) -> None:
    for found in ranks.run(2, differences, model, comm_type, documents, False, timeout=120):
        assert max(found) < 1e-6
    for found in ranks.run(2, differences, model, comm_type, documents, True, timeout=120):
        assert min(found) > 0.01


def chosen(world: World, comm_type: str, factor: float) -> str:
    """The row of the start table, or why the run ends, with the package's result times a factor (rank function)."""
    parallel = ParallelConfig(cp=world.size, cp_comm_type=comm_type)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    with installed("transformer_engine"), started(world, parallel) as runtime, pytest.MonkeyPatch.context() as patch:
        from transformer_engine.pytorch import DotProductAttention

        right = DotProductAttention._between_ranks
        patch.setattr(DotProductAttention, "_between_ranks", lambda *args, **how: right(*args, **how) * factor)
        try_on(runtime.device, CP_ATTENTION, patch)
        context = run_context(
            tiny(MoeConfig(), **sizes), runtime, torch.bfloat16, torch.device("cuda"), parallel=parallel
        )
        try:
            value, row = selected(CP_ATTENTION, context)
        except ValueError as error:
            return str(error)
        assert isinstance(value, TeCpAttention)
        return f"{row.name}: {row.why}"


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
def test_it_is_used_if_it_computes_the_same_and_else_refused(ranks: RankPool, comm_type: str) -> None:
    for row in ranks.run(2, chosen, comm_type, 1.0, timeout=120):
        assert row == f"TransformerEngine, {comm_type}: asked for"
    for message in ranks.run(2, chosen, comm_type, 1.05, timeout=120):
        assert f"parallel.cp_comm_type={comm_type}: TransformerEngine differs from attention with the" in message
        assert message.endswith("Use parallel.cp_comm_type=all_gather")


def refused(world: World, comm_type: str, model: dict[str, Any]) -> str:
    """Why TransformerEngine's attention does not take what a rule keeps from it (rank function)."""
    try:
        differences(world, model, comm_type, False, False)
    except AssertionError as error:
        return str(error)
    return ""


def test_what_the_rules_keep_from_it_fails_its_trial(ranks: RankPool) -> None:
    assert "neither windows nor sinks" in ranks.run(2, refused, "p2p", {"sliding_window": 9}, timeout=120)[0]
    assert "heads are not divisible" in ranks.run(2, refused, "a2a", {"num_query_groups": 1}, timeout=120)[0]
