"""A run made from Megatron-Core's own checkpoint computes what its GPTModel does."""

import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from conf.commands import ImportMegatronConfig, InferenceConfig
from conf.schema import ModelConfig, MoeConfig
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import Outcome, in_rank
from training.run_dir import load_config

LENGTH, VOCABULARY, PADDED = 24, 60, 64
IDS = [(7 * i + i * i) % VOCABULARY for i in range(LENGTH)]
SIZES: dict[str, Any] = {
    **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "activation": "swiglu"},
    **{"vocab_size": VOCABULARY, "norm_eps": 1e-5},
}
SPARSE: dict[str, Any] = {
    **{"num_moe_experts": 4, "moe_ffn_hidden_size": 40, "moe_router_topk": 2, "moe_router_dtype": "fp32"},
    **{"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather"},
}
OUR_SPARSE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40, "capacity_factor": None}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # "sparse" and "dense": layers are stacked in one tensor. The others: each layer has its own tensors.
    "sparse": (SPARSE, {"ffn_hidden_size": 48}, OUR_SPARSE),
    "biased": (
        {**SPARSE, "moe_layer_freq": [0, 1], "add_bias_linear": True},
        {"ffn_hidden_size": 48, "attention_bias": True, "attention_output_bias": True, "ffn_bias": True},
        {**OUR_SPARSE, "first_dense_layers": 1, "expert_bias": True, "router_bias": True},
    ),
    "dense": ({"share": True}, {"ffn_hidden_size": 48, "tie_embeddings": True}, {"num_experts": 0}),
    "mixed": (
        {
            **SPARSE,
            **{"moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 24, "qk_layernorm": True},
            **{"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "add_qkv_bias": True},
            "moe_shared_expert_gate": True,
        },
        {"ffn_hidden_size": 48, "qk_norm": "head", "attention_bias": True},
        {
            **OUR_SPARSE,
            **{"first_dense_layers": 1, "num_shared_experts": 1, "shared_ffn_hidden_size": 24, "renormalize": True},
            **{"score_function": "sigmoid", "softmax_order": "before", "bias_update_rate": 0.0},
            "shared_expert_gate": True,
        },
    ),
}


def model_of(name: str) -> ModelConfig:
    _, settings, moe = CASES[name]
    return ModelConfig(**SIZES, **settings, moe=MoeConfig(**moe))


def saved_by_megatron(world: World, name: str, directory: str) -> Tensor:
    """Logits [S, V] of a GPTModel with random weights, which dist_checkpointing has saved with an optimizer's state."""
    from parallel import process_groups
    from parallel.layout import Layout

    process_groups.start(world, Layout(1), seed=1, timeout=60.0)
    try:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        gpt = gpt_model(dict(CASES[name][0]))
        torch.manual_seed(5)
        with torch.no_grad():
            for key, weight in [*gpt.named_parameters(), *gpt.named_buffers()]:
                if "norm" in key:
                    weight.copy_(1 + 0.2 * torch.randn_like(weight))
                elif weight.is_floating_point():
                    weight.copy_(0.25 * torch.randn_like(weight))
            hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
            logits = gpt.eval()(torch.tensor([IDS]), torch.arange(LENGTH)[None], hidden)[0, :, :VOCABULARY].clone()
            moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.output_layer.weight", torch.ones(3))
            Path(directory).mkdir(parents=True)
            with mock.patch("torch.cuda.synchronize"):  # it is called where there is no GPU too
                dist_checkpointing.save(gpt.sharded_state_dict() | {"moment": moment}, directory)
        return logits
    finally:
        process_groups.stop()


def gpt_model(settings: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from parallel.megatron_compat import name_missing_gemm

    name_missing_gemm()
    share = settings.pop("share", False)
    core = TransformerConfig(
        **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48},
        **{"normalization": "RMSNorm", "gated_linear_unit": True, "hidden_dropout": 0.0},
        **{"activation_func": torch.nn.functional.silu, "attention_dropout": 0.0},
        **{"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "gradient_accumulation_fusion": False},
        **{"bias_activation_fusion": False, "masked_softmax_fusion": False, "bias_dropout_fusion": False},
        **{"apply_rope_fusion": False},
        **{"add_bias_linear": False, **settings},
    )
    if "moe_layer_freq" in settings:
        spec = get_gpt_decoder_block_spec(core, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(num_experts=core.num_moe_experts, normalization="RMSNorm")
    return GPTModel(
        core,
        spec,
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=share,
    )


def our_logits(world: World, run: str) -> Tensor:
    from training.load_checkpoint import load_model

    with load_model(run, InferenceConfig(precision="fp32"), world) as loaded:
        (stage,) = loaded.built.engine.modules
        return stage(torch.tensor([IDS]), torch.arange(LENGTH)[None])[0].detach()


def imported(ranks: RankPool, model: ModelConfig, source: Path, output: Path) -> Outcome:
    config = ImportMegatronConfig(model=model, source=str(source), output=str(output), sequence_length=LENGTH)
    return ranks.run(1, in_rank, _import, config, timeout=120.0)[0]


def _import(config: ImportMegatronConfig) -> int:
    from training.megatron_import import import_model

    return import_model(config)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Directory and logits of each case."""
    folder = tmp_path_factory.mktemp("megatron")
    return {
        name: (folder / name, ranks.run(1, saved_by_megatron, name, str(folder / name), timeout=120.0)[0])
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_megatron(name: str, saved, ranks: RankPool, tmp_path: Path) -> None:
    source, logits = saved[name]
    code, printed = imported(ranks, model_of(name), source, tmp_path / "run")
    assert code == 0 and "of _extra_state, 1 of the optimizer)" in printed, printed
    assert load_config(tmp_path / "run").model.moe == model_of(name).moe
    found = ranks.run(1, our_logits, str(tmp_path / "run"), timeout=120.0)[0]
    assert (found - logits).norm() <= 1e-5 * logits.norm()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 3}, "decoder.layers.self_attention.linear_qkv.weight [2, 64, 32] instead of [3, 64, 32]"),
        ({"attention_bias": True}, "1 missing: decoder.layers.self_attention.linear_qkv.bias"),
        ({"tie_embeddings": True}, "1 unexpected: output_layer.weight"),
        ({"vocab_size": 72}, "embedding.word_embeddings.weight [64, 32] instead of [72, 32]"),
        ({"qk_norm": "full"}, "2 missing: decoder.layers.self_attention.q_layernorm.weight"),
        ({"mtp_num_layers": 1}, "layers for multi-token prediction are not imported from Megatron-Core; nearest: 0"),
    ],
    ids=str,
)
def test_another_model_is_refused(change: dict, expected: str, saved, ranks: RankPool, tmp_path: Path) -> None:
    settings = SIZES | CASES["sparse"][1] | change
    model = ModelConfig(**settings, moe=MoeConfig(**OUR_SPARSE))
    code, message = imported(ranks, model, saved["sparse"][0], tmp_path / "run")
    assert code == 2 and expected in message, message
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint(saved, ranks: RankPool, tmp_path: Path) -> None:
    refuse = partial(imported, ranks, model_of("sparse"), tmp_path / "source", tmp_path / "run")
    shutil.copytree(saved["sparse"][0], tmp_path / "source")
    for file in (tmp_path / "source").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, message = refuse()
    assert code == 2 and " cannot be read: " in message, message
    (tmp_path / "source" / ".metadata").write_bytes(pickle.dumps(shutil.rmtree))
    code, message = refuse()
    assert code == 2 and "it names shutil.rmtree, which does not belong there" in message, message
    (tmp_path / "source" / ".metadata").unlink()
    code, message = refuse()
    assert code == 2 and "is no torch_dist checkpoint of Megatron-Core: it has no .metadata" in message, message
    assert not (tmp_path / "run").exists()


def test_the_latest_checkpoint_of_a_save_directory(saved, tmp_path: Path) -> None:
    from models.megatron_checkpoint import MegatronCheckpoint

    shutil.copytree(saved["dense"][0], tmp_path / "iter_0000070")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("70\n")
    assert MegatronCheckpoint(tmp_path).directory == tmp_path / "iter_0000070"
