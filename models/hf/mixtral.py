"""Mixtral (transformers/models/mixtral/configuration_mixtral.py, modeling_mixtral.py; the names on disk are those of
conversion_mapping.py, which Transformers 5 reads and writes)."""

from conf.schema import ModelConfig
from models.hf.decoder import ATTENTION, LAYER, NORMS, OUTSIDE, decoder_fields
from models.hf.family import GATE_AND_UP, TRANSPOSED, Family, Field, Weights

SPARSE = f"model.{LAYER}block_sparse_moe."


def _one_expert(model: ModelConfig) -> str | None:
    if model.moe.top_k > 1:
        return None
    return "model.moe.top_k=1: a Mixtral divides the chosen probabilities by their sum, which leaves a gate of 1"


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
        *decoder_fields(vocab_size=32000, hidden_size=4096, layers=32, heads=32, groups=8, eps=1e-5),
        Field("intermediate_size", "ffn_hidden_size", 14336),
        Field("num_local_experts", "moe.num_experts", 8),
        Field("num_experts_per_tok", "moe.top_k", 2),
        Field(
            "router_aux_loss_coef",
            "moe.aux_loss_coeff",
            0.001,
            # Theirs counts a token top_k times and pools the layers, which ours are added up over.
            to_ours=lambda value, config: value * config["num_experts_per_tok"] / config["num_hidden_layers"],
            to_theirs=lambda value, model: value * model.num_layers / model.moe.top_k,
        ),
    ),
    weights=(
        *OUTSIDE,
        *NORMS,
        *ATTENTION,
        Weights(LAYER + "ffn.router.weight", (SPARSE + "gate.weight",)),
        Weights(
            LAYER + "ffn.experts.w_in",
            (SPARSE + "experts.{expert}.w1.weight", SPARSE + "experts.{expert}.w3.weight"),
            GATE_AND_UP,
        ),
        Weights(LAYER + "ffn.experts.w_out", (SPARSE + "experts.{expert}.w2.weight",), TRANSPOSED),
    ),
    rope_theta=1e6,
    off={"sliding_window": None, "attention_dropout": 0.0, "router_jitter_noise": 0.0},
    settings={"moe.softmax_order": ("after", "before"), "moe.renormalize": (None, True)},
    training={"moe.capacity_factor": None, "moe.eval_capacity_factor": None, "moe.z_loss_coeff": 0.0},
    refuse=_one_expert,
)
