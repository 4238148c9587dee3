"""`python -m tests.stand_ins.parity`: trains the models of the parity matrix (benchmarks.parity) with the stand-in for
TransformerEngine in every layer, under many layouts and kinds of recomputation, and compares with one rank without it.
Exits with 1 if a cell deviates by more than 1e-5."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.parity import LIMIT, SECONDS, Layouts, Outcome, agreement, deviations, measure, one_rank
from benchmarks.parity_variants import VARIANTS
from benchmarks.tiny import Variant
from conf.schema import ParallelConfig
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.stand_ins import installed

SEQUENCE = {"tp": 2, "sequence_parallel": True}
FURTHER = {
    "recomputed": Variant({"recompute": ["activation", "norm"], "attention_bias": True}, {"num_shared_experts": 1}),
    "recomputed_dense": Variant({"recompute": ["activation"], "ffn_bias": True}, {"num_experts": 0}),
    "recomputed_moe": Variant({"recompute": ["moe"]}, {"num_shared_experts": 1, "expert_bias": True}),
    "recomputed_layers": Variant({"recompute": ["full"], "qk_norm": "head"}, {"num_shared_experts": 1, "every": 2}),
    "centered": Variant({"norm_zero_centered": True, "attention_bias": True, "sliding_window": 5}, document_mask=True),
}
"""Besides those of the matrix."""
MODELS = {**VARIANTS, **FURTHER}
MATRIX = [
    Layouts("one rank", 1, {}, ["drops", "dense", "mla", "chunks", *FURTHER], "recomputed_layers"),
    Layouts(
        "tp2",
        2,
        {"tp": 2},
        ["qwen3", "qwen2", "gpt_oss", "gated_dense", "mtp", "lora", "dora", *FURTHER],
        "gpt_oss recomputed_dense",
    ),
    Layouts(
        "tp2 +sequence",
        2,
        SEQUENCE,
        ["deepseek", "mla_documents", "phimoe", "llama4", "mtp_documents", "lora_dense", *FURTHER],
        "mtp_documents phimoe recomputed centered",
    ),
    Layouts("pp2", 2, {"pp": 2}, ["switch_documents", "dense", "mtp", "recomputed"]),
    Layouts("pp2 vpp2", 2, {"pp": 2, "vpp": 2}, ["switch", "dense", "recomputed_layers"], "dense"),
    Layouts("cp2", 2, {"cp": 2}, ["switch_documents", "gpt_oss", "mla", "chunks", "centered"], "centered"),
    Layouts("ep2", 2, {"ep": 2}, ["dropless", "overlap", "overlap_padded", "recomputed_moe"], "overlap"),
    Layouts("dp2 +overlap", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, ["dropless", "dense"]),
    Layouts("dp2 instances2", 2, {"optimizer_instances": 2}, ["drops", "recomputed"]),
    Layouts("ep2 etp2", 4, {"ep": 2, "etp": 2}, ["dropless", "muon", "overlap_lora"]),
    Layouts("cp2 tp2 +sequence", 4, {"cp": 2, **SEQUENCE}, ["drops", "gpt_oss", "mtp_documents", "recomputed"]),
    Layouts("tp2 pp2 vpp2 ep2 dp2 +sequence", 8, {"pp": 2, "vpp": 2, "ep": 2, **SEQUENCE}, ["switch", "recomputed"]),
]


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


def main() -> int:
    bad = 0
    with RankPool(8) as pool:
        for layouts in MATRIX:
            for name, found in cells(pool, layouts, layouts.variants):
                what = max(found, key=lambda key: found[key])
                bad += found[what] > LIMIT
                print(f"{layouts.name:<32} {name:<18} {found[what]:8.1e}  {what}", flush=True)
    print(f"{bad} of {sum(len(layouts.variants) for layouts in MATRIX)} cells deviate")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
