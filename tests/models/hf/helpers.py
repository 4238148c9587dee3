"""Small models of Transformers on the disk, and imports and exports in rank processes of the pool."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.commands import ExportConfig, ImportConfig
from corpus.tokenizer import Tokenizer
from parallel.env import World
from parallel.local_launcher import RankPool
from training import hf_verify

VOCABULARY, LENGTH = 320, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": 0,
    "attn_implementation": "eager",
}


def save_model(kind: str, folder: Path, corpus: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model with weights so large that a wrong one shows, by save_pretrained, and its tokenizer."""
    import transformers

    torch.manual_seed(3)
    of_kind = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = of_kind(**{**SIZES, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if "norm" in name else 0.25 * torch.randn_like(weight))
        for name, buffer in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder, max_shard_size="40KB")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    Tokenizer.train(texts, vocab_size=VOCABULARY, eod_token="<|endoftext|>").save(str(folder / "tokenizer.json"))
    return folder


def save_by_hand(folder: Path) -> Path:
    """A Mixtral as the hub has them, without Transformers: bf16, two shards, config.json of Transformers 4."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 40,
    }
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16), "model.norm.weight": (16,)}
    shapes |= {f"{layer}{norm}_layernorm.weight": (16,) for norm in ("input", "post_attention")}
    shapes |= {f"{layer}self_attn.{p}_proj.weight": (n, 16) for p, n in (("q", 16), ("k", 8), ("v", 8), ("o", 16))}
    shapes |= {f"{layer}block_sparse_moe.gate.weight": (3, 16)}
    for expert in range(3):
        name = f"{layer}block_sparse_moe.experts.{expert}."
        shapes |= {f"{name}w1.weight": (24, 16), f"{name}w2.weight": (16, 24), f"{name}w3.weight": (24, 16)}
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_bits(folder: Path, other: Path) -> None:
    ours, theirs = tensors_in(folder), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


Outcome = tuple[int, str]
"""(exit code, what was printed, or the message of a ValueError for code 2)."""


def run_import(ranks: RankPool, source: Path, output: Path, **settings: Any) -> Outcome:
    config = ImportConfig(source=str(source), output=str(output), sequence_length=LENGTH, **settings)
    return ranks.run(1, in_rank, _import, config, timeout=120.0)[0]


def run_export(ranks: RankPool, checkpoint: Path, output: Path, **settings: Any) -> Outcome:
    config = ExportConfig(checkpoint=str(checkpoint), output=str(output), **settings)
    return ranks.run(1, in_rank, _export, config, timeout=120.0)[0]


def in_rank(world: World, run: Callable[[Any], int], config: Any) -> Outcome:
    """As launch.cli.command maps errors to exit codes."""
    printed = io.StringIO()
    # While the engine runs, standard output is another one (training.output_redirect).
    verdict = mock.patch.object(hf_verify, "print", lambda line: print(line, file=printed), create=True)
    try:
        with contextlib.redirect_stdout(printed), verdict:
            return run(config), printed.getvalue()
    except ValueError as error:
        return 2, str(error)


def _import(config: ImportConfig) -> int:
    from training.hf_import import import_model

    return import_model(config)


def _export(config: ExportConfig) -> int:
    from training.hf_export import export_model

    return export_model(config)
