"""`python -m benchmarks.parity`: verifies that every layout trains the same model. Trains a tiny model for three steps
under many layouts and compares losses, the gradient of every parameter, gradient norms, routing, drops, held-out loss
and next-token logits with those of a single rank. Prints the largest deviation of each cell; exits with 1 if any
deviates.

Runs simulated ranks on the CPU, or sharing a GPU. Legend: S steps, L sparse layers, E experts, V vocabulary.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tiny import (
    MICRO_BATCHES,
    OPTIM,
    PADDING_BS,
    VOCABULARY,
    Variant,
    build_engine,
    gradients,
    my_batches,
    started,
)
from conf.schema import ModelConfig, ParallelConfig, RopeScalingConfig
from models.logits import next_token_logits
from parallel.engine import Engine, Overlap
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime

LIMIT = 1e-5
"""Maximum relative deviation, from the order of fp32 sums; loads and drops must be equal."""
SECONDS = 300.0
"""Time limit per layout."""

# Methods other than Switch's that decide over the whole micro-batch, or could depend on the order of its tokens.
DEEPSEEK = {"score_function": "sigmoid", "num_experts": 8, "num_expert_groups": 4, "top_k_groups": 2}
DEEPSEEK |= {"load_balancing": "seq_aux_loss", "drop_policy": "probability", "bias_update_rate": 0.01}
GLOBAL = {"load_balancing": "global_aux_loss", "jitter": 0.1, "drop_policy": "random", "every": 2}
GPT_OSS = {"sliding_window": 5, "full_attention_every": 2, "attention_sinks": True, "attention_bias": True}
GPT_OSS |= {"attention_output_bias": True, "activation": "clamped_swiglu"}
CHUNKS = {"attention_chunk_size": 5, "ffn_bias": True, "attention_sinks": True}
CHUNKS |= {"norm": "layernorm", "norm_zero_centered": True, "qk_norm": "full"}
CHUNKS |= {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
CHUNKS |= {"logit_multiplier": 0.5, "logit_softcap": 2.0}
ALIKE = {"document_mask": True, "begin_alike": True}
PACKED = {"document_mask": True, "packed": True}
LLAMA4 = {"attention_chunk_size": 5, "full_attention_every": 2, "no_rope_every": 2, "qk_norm": "l2"}
LLAMA4 |= {"attention_temperature": 0.5, "attention_temperature_tokens": 4, "rope_interleave": True}
GATED_INPUTS = {"score_function": "sigmoid", "renormalize": False, "gate_on": "input", "num_shared_experts": 1}
LONGROPE = RopeScalingConfig("longrope", original_max_position_embeddings=12, long_mscale=1.2)
LONGROPE.short_factor, LONGROPE.long_factor = [1.0, 1.0, 1.5, 2.0], [1.0, 2.0, 4.0, 8.0]
PHIMOE = {"norm": "layernorm", "head_bias": True, "rope_scaling": LONGROPE}
YARN = RopeScalingConfig("yarn", factor=4.0, original_max_position_embeddings=8, mscale_all_dim=1.0)
MLA = {"num_query_groups": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"rope_interleave": True}
MUON = {"name": "muon"}
MTP = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}

VARIANTS = {
    "drops": Variant(),
    "dropless": Variant({"tie_embeddings": True}, {"capacity_factor": None, "every": 2}, document_mask=True),
    "switch": Variant({"tie_embeddings": True}, {"top_k": 1}),
    "switch_documents": Variant(moe={"top_k": 1, "every": 2}, document_mask=True),
    "deepseek": Variant(moe=DEEPSEEK),
    "expert_choice": Variant(moe={"load_balancing": "expert_choice", "capacity_factor": 0.75}),
    "sinkhorn": Variant(moe={"load_balancing": "sinkhorn", "jitter": 0.1, "drop_policy": "random"}),
    "global": Variant(moe=GLOBAL),
    "global_bias": Variant(moe=GLOBAL | {"bias_update_rate": 0.01}),
    "ties": Variant(moe={"drop_policy": "probability", "capacity_factor": 0.5}, **ALIKE),
    "ties_choice": Variant(moe={"load_balancing": "expert_choice", "top_k": 1, "capacity_factor": 0.5}, **ALIKE),
    "per_sequence": Variant(moe={"capacity_per": "sequence", "drop_policy": "probability"}),
    "qwen3": Variant({"head_dim": 12, "qk_norm": "head"}, {"ffn_hidden_size": 20, "first_dense_layers": 1}),
    "olmoe": Variant({"qk_norm": "full", "clip_qkv": 1.0}),
    "qwen2": Variant({"attention_bias": True}, {"num_experts": 0}),
    "rope": Variant({"partial_rotary_factor": 0.5, "rope_interleave": True, "rope_scaling": YARN}),
    "mla": Variant(MLA | {"q_lora_rank": 20, "rope_scaling": YARN}, DEEPSEEK | {"num_shared_experts": 1}),
    "mla_documents": Variant(MLA, {"first_dense_layers": 1}, document_mask=True),
    "gpt_oss": Variant(GPT_OSS, {"softmax_order": "after", "router_bias": True, "expert_bias": True}),
    "llama4": Variant(LLAMA4, GATED_INPUTS, document_mask=True),
    "phimoe": Variant(PHIMOE, {"sparse_mixer_eps": 0.3}),
    "gated": Variant({"attention_output_gate": "head", "attention_bias": True, "qk_norm": "head"}, {"every": 2}),
    "gated_dense": Variant({"attention_output_gate": "elementwise", "head_dim": 12}, {"num_experts": 0}),
    "chunks": Variant(CHUNKS, {"num_experts": 0}, document_mask=True),
    "dense": Variant({"tie_embeddings": True}, {"num_experts": 0}),
    "muon": Variant(moe={"num_shared_experts": 1, "every": 4, "expert_bias": True}, optim=MUON),
    "muon_mla": Variant(MLA, {"num_experts": 8}, optim=MUON),
    "mtp": Variant({"mtp_num_layers": 1}, {"score_function": "sigmoid", "drop_policy": "probability"}),
    "mtp_documents": Variant(MTP | {"tie_embeddings": True}, {"bias_update_rate": 0.01}, document_mask=True),
    "mtp_latent": Variant(MLA | MTP, {"capacity_factor": None, "load_balancing": "seq_aux_loss"}),
    "chat": Variant({"attention_sinks": True}, {"drop_policy": "probability", "bias_update_rate": 0.01}, **PACKED),
    "chat_mtp": Variant(MTP, {"load_balancing": "seq_aux_loss"}, **PACKED),
    "six_layers": Variant({"num_layers": 6, "tie_embeddings": True}, {"top_k": 2}),
}


@dataclass(frozen=True)
class Layouts:
    """Cells of the matrix: one layout with several variants of the model."""

    name: str
    ranks: int
    degrees: dict[str, Any]
    variants: list[str]
    tested: str = ""
    """The variants, separated by spaces, that the tests run as well."""


SEQUENCE_PARALLEL = {"tp": 2, "sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EIGHT = {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}

MATRIX = [
    Layouts(
        "tp2",
        2,
        {"tp": 2},
        [
            *("drops", "switch_documents", "dense", "global", "global_bias", "qwen3", "qwen2", "olmoe", "mla"),
            *("gpt_oss", "chunks", "muon", "mtp", "llama4", "phimoe", "gated", "gated_dense", "chat"),
        ],
        "drops global global_bias qwen2 olmoe mla chunks muon mtp llama4 phimoe gated gated_dense",
    ),
    Layouts(
        "tp2 +sequence",
        2,
        SEQUENCE_PARALLEL,
        [
            "switch",
            "dropless",
            "deepseek",
            "expert_choice",
            "sinkhorn",
            "global",
            "global_bias",
            "ties",
            "ties_choice",
            "per_sequence",
            "qwen3",
            "qwen2",
            "olmoe",
            "mla",
            "mla_documents",
            "gpt_oss",
            "chunks",
            "muon_mla",
            "mtp_documents",
            "mtp_latent",
            "llama4",
            "phimoe",
            "gated",
            "chat_mtp",
        ],
        "deepseek expert_choice sinkhorn ties ties_choice per_sequence qwen3 olmoe mla mla_documents gpt_oss muon_mla "
        "mtp_latent gated chat_mtp",
    ),
    Layouts(
        "pp2",
        2,
        {"pp": 2},
        [
            *("dropless", "deepseek", "dense", "qwen3", "olmoe", "mla", "gpt_oss", "muon", "mtp", "mtp_documents"),
            *("llama4", "phimoe", "gated", "chat_mtp"),
        ],
        "dropless qwen3 olmoe muon mtp mtp_documents",
    ),
    Layouts("pp2 layers 1+3", 2, {"pp": 2, "pp_layers": [1, 3]}, ["drops", "dropless"], "dropless"),
    Layouts("pp4", 4, {"pp": 4}, ["switch", "drops", "mtp"], "switch"),
    Layouts("pp4 layers 1+2+2+1", 4, {"pp": 4, "pp_layers": [1, 2, 2, 1]}, ["six_layers"]),
    Layouts("pp2 vpp2", 2, {"pp": 2, "vpp": 2}, ["switch_documents", "switch", "dense", "mtp"], "switch"),
    Layouts("pp2 vpp2 layers 1+2+1+2", 2, {"pp": 2, "vpp": 2, "pp_layers": [1, 2, 1, 2]}, ["six_layers"]),
    Layouts(
        "cp2",
        2,
        {"cp": 2},
        [
            *("drops", "switch_documents", "deepseek", "sinkhorn", "qwen3", "olmoe", "rope", "mla", "mla_documents"),
            *("gpt_oss", "chunks", "mtp", "mtp_documents", "llama4", "phimoe", "gated", "chat", "chat_mtp"),
        ],
        "drops sinkhorn rope mla_documents chunks mtp_documents llama4 chat",
    ),
    Layouts(
        "cp4",
        4,
        {"cp": 4},
        ["drops", "dropless", "ties", "ties_choice", "per_sequence", "gpt_oss", "chunks"],
        "gpt_oss",
    ),
    Layouts("ep2", 2, {"ep": 2}, ["switch", "dropless", "muon", "mtp"], "dropless muon mtp"),
    Layouts("ep4", 4, {"ep": 4}, ["drops", "deepseek", "llama4"], "deepseek llama4"),
    Layouts("etp2", 2, {"etp": 2}, ["drops", "dropless", "mtp"], "drops"),
    Layouts(
        "ep2 etp2", 4, {"ep": 2, "etp": 2}, ["dropless", "switch", "mla", "gpt_oss", "muon", "llama4"], "dropless muon"
    ),
    Layouts(
        "dp2",
        2,
        {},
        ["switch", "drops", "global", "global_bias", "muon", "mtp_documents", "chat", "chat_mtp"],
        "switch global global_bias muon chat",
    ),
    Layouts("dp2 +overlap", 2, OVERLAP, ["dropless", "deepseek"], "dropless"),
    Layouts("dp4 +overlap", 4, OVERLAP, ["switch", "dense", "muon", "muon_mla"]),
    Layouts("tp2 pp2", 4, {"tp": 2, "pp": 2}, ["dense", "deepseek", "mtp_documents"], "dense"),
    Layouts("tp2 ep2", 2, {"tp": 2, "ep": 2}, ["switch_documents", "drops"], "switch_documents"),
    Layouts("tp2 ep2 +sequence", 2, {**SEQUENCE_PARALLEL, "ep": 2}, ["deepseek", "switch"]),
    Layouts("tp2 etp2", 2, {"tp": 2, "etp": 2}, ["drops", "switch_documents"]),
    Layouts("tp2 etp2 +sequence", 2, {**SEQUENCE_PARALLEL, "etp": 2}, ["drops", "dropless"]),
    Layouts("pp2 ep2", 4, {"pp": 2, "ep": 2}, ["switch", "deepseek"]),
    Layouts("pp2 etp2", 4, {"pp": 2, "etp": 2}, ["dropless"]),
    Layouts("pp2 dp2 +overlap", 4, {"pp": 2, **OVERLAP}, ["switch", "drops", "mtp"]),
    Layouts("pp2 vpp2 dp2 +overlap", 4, {"pp": 2, "vpp": 2, **OVERLAP}, ["dropless"]),
    Layouts("cp2 tp2", 4, {"cp": 2, "tp": 2}, ["switch_documents", "rope", "mla", "mla_documents", "muon_mla"]),
    Layouts(
        "cp2 tp2 +sequence",
        4,
        {"cp": 2, **SEQUENCE_PARALLEL},
        ["drops", "deepseek", "qwen3", "olmoe", "mla", "gpt_oss", "chunks", "mtp_documents"],
    ),
    Layouts("cp2 pp2", 4, {"cp": 2, "pp": 2}, ["dropless", "mtp_latent"]),
    Layouts("cp2 ep2", 2, {"cp": 2, "ep": 2}, ["deepseek", "switch"]),
    Layouts("cp2 dp2 +overlap", 4, {"cp": 2, **OVERLAP}, ["drops"]),
    Layouts(
        "tp2 pp2 ep2", 4, {"tp": 2, "pp": 2, "ep": 2}, ["dropless", "switch", "gpt_oss", "llama4", "phimoe"], "dropless"
    ),
    Layouts(
        "tp2 pp2 vpp2 ep2 dp2 +sequence", 8, {**EIGHT, "sequence_parallel": True}, ["switch", "drops", "mtp"], "switch"
    ),
    Layouts("tp2 pp2 vpp2 ep2 dp2 +overlap", 8, {**EIGHT, **OVERLAP}, ["deepseek", "muon", "mtp_documents", "chat"]),
    Layouts("cp2 tp2 ep4", 8, {"cp": 2, "tp": 2, "ep": 4}, ["drops", "expert_choice"], "drops expert_choice"),
    Layouts("cp2 tp2 pp2", 8, {"cp": 2, "tp": 2, "pp": 2}, ["switch"]),
    Layouts(
        "cp2 tp2 pp2 +sequence", 8, {"cp": 2, "pp": 2, **SEQUENCE_PARALLEL}, ["expert_choice", "global", "global_bias"]
    ),
]


@dataclass
class Outcome:
    """The results that must agree between layouts."""

    losses: list[float]
    norms: list[float]
    load_SLE: np.ndarray
    dropped_SL: np.ndarray
    """Per step (S) and sparse layer; without axes L and E for a dense model."""
    router: list[float]
    """Entropy, auxiliary and z-loss of all steps and layers."""
    evaluation: tuple[float, int]
    logits_V: np.ndarray
    further: list[float]
    """Losses of multi-token prediction."""
    gradients: dict[str, np.ndarray] | None
    """Gradients of step 1, on rank 0 only."""


def measure(world: World, parallel: ParallelConfig, variants: dict[str, Variant], steps: int = 3) -> dict[str, Outcome]:
    """Trains each variant for some steps, evaluates it and computes next-token logits. Runs on each rank."""
    with started(world, parallel) as runtime:
        overlap = Overlap.of(parallel, runtime.backend)
        return {name: _measure(runtime, variant, overlap, steps) for name, variant in variants.items()}


def _measure(runtime: Runtime, variant: Variant, overlap: Overlap, steps: int) -> Outcome:
    from models.mtp import collect_losses

    engine = build_engine(runtime, variant, dataclasses.replace(OPTIM, **variant.optim), overlap)
    batches = functools.partial(my_batches, runtime, begin_alike=variant.begin_alike, as_packed=variant.packed)
    results, loads, first = [], [], None
    for step in range(steps):
        loss = engine.forward_backward(batches(step), step=step).item()
        if step == 0:
            first = gradients(engine)
        results.append((loss, engine.update(OPTIM.lr, loss=loss)[0]))
        loads.append(_expert_load(engine, variant.config()))
    losses, norms = (list(column) for column in zip(*results, strict=True))
    sparse, averaged = [load for load in loads if load is not None], ("router_entropy", "aux_loss", "z_loss")
    return Outcome(
        losses,
        norms,
        np.array([load.load_LE for load in sparse]),
        np.array([load.dropped_L for load in sparse]),
        [float(x) for load in sparse for name in averaged for x in load.metric(name)],
        engine.evaluate([batch | {"padding": PADDING_BS} for batch in batches(99)]),
        # 11 tokens: not divisible by the degrees of context and tensor parallelism.
        next_token_logits(engine, VOCABULARY, [*range(11)]).numpy(),
        collect_losses(engine.modules, variant.config().mtp_num_layers, runtime.device),
        {name: whole.numpy() for name, whole in first.items()} if runtime.world.rank == 0 else None,
    )


def _expert_load(engine: Engine, model: ModelConfig) -> Any:
    from moe.metrics import collect

    mine = {layer: moe.statistics for module in engine.modules for layer, moe in module.sparse().items()}
    layout, device = engine.runtime.layout, engine.runtime.device
    return collect(mine, model.routed_layers, model.moe.num_experts, layout, MICRO_BATCHES, device)


def relative(got: object, wanted: object) -> float:
    """The norm of the difference relative to the norm of `wanted`."""
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30)) if wanted.size else 0.0


def deviations(got: Outcome, wanted: Outcome) -> dict[str, float]:
    """The deviations of a layout from a single rank; infinity for results that must be equal and are not."""

    def equal(same: bool) -> float:
        return 0.0 if same else float("inf")

    assert got.gradients is not None and wanted.gradients is not None
    assert got.gradients.keys() == wanted.gradients.keys()
    grads = {f"gradient of {name}": relative(got.gradients[name], g) for name, g in wanted.gradients.items()}
    return {
        "loss": max(map(relative, got.losses, wanted.losses)),
        "gradient norm": max(map(relative, got.norms, wanted.norms)),
        "expert load": equal(np.array_equal(got.load_SLE, wanted.load_SLE)),
        "drops": equal(np.array_equal(got.dropped_SL, wanted.dropped_SL)),
        "router": relative(got.router, wanted.router),
        "held-out loss": relative(got.evaluation[0], wanted.evaluation[0]),
        "held-out tokens": equal(got.evaluation[1] == wanted.evaluation[1]),
        "logits": relative(got.logits_V, wanted.logits_V),
        **({"loss of multi-token prediction": relative(got.further, wanted.further)} if wanted.further else {}),
        **grads,
    }


def agreement(every: list[Outcome]) -> float:
    """0 if all ranks of a layout have the same results, else infinity."""
    first = every[0]
    same = all(
        (other.losses, other.norms, other.evaluation) == (first.losses, first.norms, first.evaluation)
        and np.array_equal(other.load_SLE, first.load_SLE)
        and np.array_equal(other.logits_V, first.logits_V)
        for other in every[1:]
    )
    return 0.0 if same else float("inf")


def one_rank(pool: RankPool, variants: dict[str, Variant]) -> dict[str, Outcome]:
    return pool.run(1, measure, ParallelConfig(), variants, timeout=SECONDS)[0]


def cells(pool: RankPool, layouts: Layouts, names: list[str]) -> Iterator[tuple[str, list[Outcome]]]:
    """The outcomes of all ranks for each named variant under a layout."""
    parallel, chosen = ParallelConfig(**layouts.degrees), {name: VARIANTS[name] for name in names}
    every = pool.run(layouts.ranks, measure, parallel, chosen, timeout=SECONDS)
    for name in names:
        yield name, [rank[name] for rank in every]


def control(pool: RankPool, wanted: Outcome) -> float:
    """The smallest deviation of a model with other initial weights, which must be far above LIMIT."""
    other = one_rank(pool, {"other": dataclasses.replace(VARIANTS["drops"], seed=2)})["other"]
    found = deviations(other, wanted)
    return min(value for what, value in found.items() if what not in ("held-out tokens", "drops"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", default="", metavar="TEXT", help="only layouts whose name contains this")
    wanted_name = parser.parse_args(arguments).k
    matrix = [layouts for layouts in MATRIX if wanted_name in layouts.name]
    count = sum(len(layouts.variants) for layouts in matrix)
    bad = 0
    print(f"{count} cells; largest relative deviation from a single rank, at most {LIMIT:g}")
    with RankPool(max((layouts.ranks for layouts in matrix), default=1)) as pool:
        alone = one_rank(pool, VARIANTS)
        for layouts in matrix:
            for name, every in cells(pool, layouts, layouts.variants):
                found = {**deviations(every[0], alone[name]), "agreement of the ranks": agreement(every)}
                what = max(found, key=lambda key: found[key])
                good = found[what] <= LIMIT
                bad += not good
                print(
                    f"{layouts.name:<32} {name:<17} {found[what]:8.1e}  {'' if good else 'DEVIATES '}{what}", flush=True
                )
        seen = control(pool, alone["drops"])
    print(f"{'control: other initial weights':<32} {'drops':<17} {seen:8.1e}  at least")
    insensitive = seen < 100 * LIMIT
    print(
        f"{bad} of {count} cells deviate"
        + ("; the control does not: the comparison is not sensitive" if insensitive else "")
    )
    return 1 if bad or insensitive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
