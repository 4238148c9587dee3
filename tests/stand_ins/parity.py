"""`python -m tests.stand_ins.parity [-k TEXT]`: trains the models of the parity matrix (benchmarks.parity) with the
stand-in for TransformerEngine in every layer, under many layouts and kinds of recomputation, and compares with one rank
without it; continues the checkpoint of each layout on one rank without it. Exits with 1 if a cell deviates by more than
1e-5."""

import argparse
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.parity import LIMIT, SECONDS, Layouts, Outcome, agreement, deviations, measure, one_rank, relative
from benchmarks.parity_variants import VARIANTS
from benchmarks.tiny import Variant, build_engine, started
from conf.schema import ParallelConfig
from parallel.checkpoint import Checkpointer
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.parallel.helpers import optimizer_tensors, state, train
from tests.stand_ins import installed

SEQUENCE = {"tp": 2, "sequence_parallel": True}
FURTHER = {
    "recomputed": Variant({"recompute": ["activation", "norm"], "attention_bias": True}, {"num_shared_experts": 1}),
    "recomputed_dense": Variant({"recompute": ["activation"], "ffn_bias": True}, {"num_experts": 0}),
    "recomputed_moe": Variant({"recompute": ["moe"]}, {"num_shared_experts": 1, "expert_bias": True}),
    "recomputed_layers": Variant({"recompute": ["full"], "qk_norm": "head"}, {"num_shared_experts": 1, "every": 2}),
    "p2p": Variant({"attention_bias": True, "recompute": ["full"]}, {"num_shared_experts": 1}, cp_comm_type="p2p"),
    "a2a": Variant({"sliding_window": 5, "full_attention_every": 2, "attention_sinks": True}, cp_comm_type="a2a"),
    "mla_p2p": dataclasses.replace(VARIANTS["mla"], cp_comm_type="p2p"),
    "p2p_documents": Variant({"num_query_groups": None}, document_mask=True, cp_comm_type="p2p"),
    "a2a_chunks": dataclasses.replace(VARIANTS["llama4"], cp_comm_type="a2a"),
    "centered": Variant({"norm_zero_centered": True, "attention_bias": True, "sliding_window": 5}, document_mask=True),
}
"""Besides those of the matrix."""
EXCHANGED = ["p2p", "a2a", "mla_p2p", "p2p_documents", "a2a_chunks"]
EVERYWHERE = [name for name in FURTHER if name not in EXCHANGED]
MODELS = {**VARIANTS, **FURTHER}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RANKS_4 = {"cp": 2, **SEQUENCE}
RANKS_8 = {"pp": 2, "vpp": 2, "ep": 2, **SEQUENCE}
BESIDES = [
    Layouts("one rank", 1, {}, ["drops", "dense", "mla", "chunks"]),
    Layouts(
        "tp2",
        2,
        {"tp": 2},
        ["qwen3", "qwen2", "gpt_oss", "gated_dense", "mla", "mtp", "lora", "dora"],
        "gpt_oss mtp recomputed_dense",
    ),
    Layouts(
        "tp2 +sequence",
        2,
        SEQUENCE,
        ["deepseek", "mla_documents", "phimoe", "llama4", "mtp_documents", "lora_dense"],
        "mla_documents mtp_documents phimoe recomputed",
    ),
    Layouts("pp2", 2, {"pp": 2}, ["switch_documents", "dense", "mtp"]),
    Layouts("pp2 vpp2", 2, {"pp": 2, "vpp": 2}, ["switch", "dense"], "recomputed_layers"),
    Layouts(
        "cp2",
        2,
        {"cp": 2},
        ["switch_documents", "gpt_oss", "mla", "chunks", *EXCHANGED],
        "centered p2p p2p_documents a2a_chunks",
    ),
    Layouts("ep2", 2, {"ep": 2}, ["dropless", "overlap", "overlap_padded"], "overlap"),
    Layouts("dp2 +overlap", 2, OVERLAP, ["dropless", "dense"]),
    Layouts("dp2 instances2", 2, {"optimizer_instances": 2}, ["drops"]),
    Layouts("ep2 etp2", 4, {"ep": 2, "etp": 2}, ["dropless", "muon", "overlap_lora"]),
    Layouts("cp2 tp2 +sequence", 4, RANKS_4, ["drops", "gpt_oss", "mtp_documents", "p2p"]),
    Layouts("cp4 pp2", 8, {"cp": 4, "pp": 2}, ["p2p", "mla_p2p", "p2p_documents"]),
    Layouts("tp2 pp2 vpp2 ep2 dp2 +sequence", 8, RANKS_8, ["switch"]),
]
MATRIX = [
    dataclasses.replace(
        layouts,
        # Megatron-Core has no expert parallelism of a model without experts.
        variants=[
            *layouts.variants,
            *(n for n in EVERYWHERE if n != "recomputed_dense" or "ep" not in layouts.degrees),
        ],
    )
    for layouts in BESIDES
]
"""Every layout with every kind of recomputation, besides what is its own."""


def measure_with_it(world: World, parallel: ParallelConfig, variants: dict[str, Variant]) -> dict[str, Outcome]:
    """benchmarks.parity.measure with the stand-in (rank function)."""
    with installed("transformer_engine"):
        return measure(
            world, parallel, {n: dataclasses.replace(v, transformer_engine=True) for n, v in variants.items()}
        )


def cells(pool: RankPool, layouts: Layouts, names: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """The deviations of each named model under a layout from one rank without the package."""
    chosen: dict[str, Any] = {name: MODELS[name] for name in names}
    alone = one_rank(pool, chosen)
    every = pool.run(layouts.ranks, measure_with_it, ParallelConfig(**layouts.degrees), chosen, timeout=SECONDS)
    for name in names:
        ranks = [rank[name] for rank in every]
        yield name, {**deviations(ranks[0], alone[name]), "agreement of the ranks": agreement(ranks)}


KEPT = Variant({"attention_bias": True, "ffn_bias": True}, {"num_shared_experts": 1, "every": 2})
"""What is saved and continued: a layer of every kind, with biases."""
Trained = tuple[list[tuple[float, float]], dict[str, dict[str, torch.Tensor]]]
Part = tuple[int, ParallelConfig, bool]
"""Ranks, their layout, and whether the stand-in computes."""


def trained(world: World, parallel: ParallelConfig, folder: str, with_it: bool, steps: range) -> Trained:
    """Losses and gradient norms of the steps, after the newest checkpoint in the folder if there is one, and what the
    optimizer keeps; writes another checkpoint (rank function)."""
    with installed("transformer_engine"), started(world, parallel) as runtime:
        engine = build_engine(runtime, dataclasses.replace(KEPT, transformer_engine=with_it))
        checkpoints = Checkpointer(Path(folder), engine, keep=3)
        if steps.start:
            assert checkpoints.resume(print) is not None
        losses = train(engine, steps)
        checkpoints.save(state(steps.stop, world.size))
        return losses, optimizer_tensors(engine)


def continued(pool: RankPool, parts: list[Part], folder: str) -> Trained:
    """A run of two steps for each part."""
    every: list[tuple[float, float]] = []
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for index, (ranks, parallel, with_it) in enumerate(parts):
        steps = range(2 * index, 2 * index + 2)
        losses, tensors = pool.run(ranks, trained, parallel, folder, with_it, steps, timeout=SECONDS)[0]
        every += losses
    return every, tensors


def deviation(got: Trained, wanted: Trained) -> float:
    """The largest of losses and gradient norms; infinity if what the optimizer keeps has other names or values that
    differ by more than rounding explains."""
    largest = max(relative(a, b) for a, b in zip(got[0], wanted[0], strict=True))
    same = got[1].keys() == wanted[1].keys() and all(
        got[1][kind].keys() == tensors.keys()
        and all(torch.allclose(got[1][kind][name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in tensors.items())
        for kind, tensors in wanted[1].items()
    )
    return largest if same else float("inf")


PLAIN: Part = (1, ParallelConfig(), False)


def checkpoint_cell(pool: RankPool, layouts: Layouts, *, first: bool) -> float:
    """The deviation of a run that began with the stand-in under a layout, and continued on one rank without it, or the
    other way round, from one rank without it."""
    with tempfile.TemporaryDirectory() as folder:
        part: Part = (layouts.ranks, ParallelConfig(**layouts.degrees), True)
        got = continued(pool, [part, PLAIN] if first else [PLAIN, part], f"{folder}/got")
        return deviation(got, continued(pool, [PLAIN, PLAIN], f"{folder}/wanted"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stand_ins.parity")
    parser.add_argument("-k", default="", metavar="TEXT", help="only layouts whose name contains this")
    wanted, bad, count = parser.parse_args(arguments).k, 0, 0
    with RankPool(8) as pool:
        for layouts in (layouts for layouts in MATRIX if wanted in layouts.name):
            worst = (
                (name, max(found.items(), key=lambda item: item[1]))
                for name, found in cells(pool, layouts, layouts.variants)
            )
            kept = (
                (f"checkpoint {'from' if first else 'to'} it", ("loss", checkpoint_cell(pool, layouts, first=first)))
                for first in (True, False)
            )
            for name, (what, value) in itertools.chain(worst, kept):
                count, bad = count + 1, bad + (value > LIMIT)
                print(f"{layouts.name:<32} {name:<18} {value:8.1e}  {what}", flush=True)
    print(f"{bad} of {count} cells deviate")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
