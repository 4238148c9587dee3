"""The layers for multi-token prediction of DeepSeek-V3 and GLM-4.5, which Transformers does not load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.commands import InferenceConfig
from parallel.batch_context import BatchContext
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import assert_same_bits, run_export, run_import, tensors_in
from tests.models.hf.test_deepseek import LAYER, with_tensors
from tests.models.hf.test_round_trip import IDS
from training.load_checkpoint import load_model

OTHER = "other values"
SPARSE = "model.layers.1."
"""A layer like the block of a layer for multi-token prediction."""


def with_further_layer(source: Path, folder: Path, **changed: Tensor) -> Path:
    """A copy of a source with the layer, as the published files have it.

    Args:
        changed: other tensors of it, by the last part of the name; None: it has none.
    """
    torch.manual_seed(5)
    stored = tensors_in(source)
    added = {n.replace(SPARSE, LAYER): t for n, t in stored.items() if n.startswith(SPARSE)}
    width = stored["model.norm.weight"].numel()
    added |= {f"{LAYER}{norm}.weight": torch.ones(width) for norm in ("enorm", "hnorm", "shared_head.norm")}
    added[f"{LAYER}eh_proj.weight"] = torch.zeros(width, 2 * width)
    added = {n: 1 + 0.2 * torch.randn_like(t) if "norm" in n else 0.25 * torch.randn_like(t) for n, t in added.items()}
    added[f"{LAYER}embed_tokens.weight"] = stored["model.embed_tokens.weight"]
    added[f"{LAYER}shared_head.head.weight"] = stored["lm_head.weight"]
    added |= {f"{LAYER}{name}": tensor for name, tensor in changed.items()}
    return with_tensors(source, folder, {n: t for n, t in added.items() if t is not None}, num_nextn_predict_layers=1)


def further_loss(world: World, checkpoint: str) -> float:
    """Of ours, over IDS (rank function for the pool)."""
    with load_model(checkpoint, InferenceConfig(precision="fp32"), world) as loaded:
        (chunk,) = loaded.built.engine.modules
        ids = torch.tensor([IDS])
        tokens_BS, labels_BS = ids[:, :-1], ids[:, 1:]
        positions_BS = torch.arange(tokens_BS.shape[1])[None]
        with torch.no_grad():
            chunk(tokens_BS, positions_BS, labels_BS, BatchContext(labels_BS=labels_BS))
        total, count = chunk.mtp_statistics.sums_2K[:, 0].tolist()
        assert count == tokens_BS.shape[1] - 1
        return total / count


def reference_loss(source: Path) -> float:
    """Of Transformers' layers around the stored tensors: positions 0 ... S - 1 of the text t_0 ... t_(S + 1) read the
    next token and predict the one after it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = {n.removeprefix(LAYER): t for n, t in tensors_in(source).items() if n.startswith(LAYER)}
    block, Norm = model.model.layers[1], type(model.model.norm)
    block.load_state_dict(_fused(tensors, block))

    def normed(x: Tensor, name: str) -> Tensor:
        norm = Norm(x.shape[-1], model.config.rms_norm_eps)
        norm.weight.data = tensors[name]
        return norm(x)

    ids = torch.tensor([IDS])
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().model
    with torch.no_grad():
        hidden = plain(input_ids=ids[:, :-2], use_cache=False).last_hidden_state
        embedded = F.embedding(ids[:, 1:-1], tensors["embed_tokens.weight"])
        joined = torch.cat([normed(embedded, "enorm.weight"), normed(hidden, "hnorm.weight")], -1)
        x = joined @ tensors["eh_proj.weight"].t()
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        out = block(x, attention_mask=mask, position_embeddings=plain.rotary_emb(x, positions), position_ids=positions)
        out = out[0] if isinstance(out, tuple) else out
        logits = normed(out, "shared_head.norm.weight") @ tensors["shared_head.head.weight"].t()
        return F.cross_entropy(logits[0].double(), ids[0, 2:]).item()


def _fused(tensors: dict[str, Tensor], block: Any) -> dict[str, Tensor]:
    """The stored tensors of single experts as Transformers' modules hold them."""
    wanted = block.state_dict().keys()
    experts = range(sum(n.endswith("up_proj.weight") and ".experts." in n for n in tensors))
    found = {n: t for n, t in tensors.items() if n in wanted}
    part = "mlp.experts.{}.{}_proj.weight"
    both = [torch.cat([tensors[part.format(e, p)] for p in ("gate", "up")]) for e in experts]
    found["mlp.experts.gate_up_proj"] = torch.stack(both)
    found["mlp.experts.down_proj"] = torch.stack([tensors[part.format(e, "down")] for e in experts])
    return found


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_it_is_imported_and_exported(name: str, sources, ranks: RankPool, tmp_path: Path) -> None:
    """With the same bits, and it predicts what Transformers' layers do with its tensors."""
    source = with_further_layer(sources[name], tmp_path / "source")
    code, printed = run_import(ranks, source, tmp_path / "run")
    assert code == 0 and "verified on" in printed, printed
    assert "1 of the layers for multi-token prediction" in printed, printed
    (found,) = ranks.run(1, further_loss, str(tmp_path / "run"), timeout=120.0)
    assert found == pytest.approx(reference_loss(source), abs=1e-4)
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back")
    assert code == 0 and "verified on" in printed, printed
    assert_same_bits(tmp_path / "back", source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1


# What changes: other values, none, or zeros of a shape.
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"embed_tokens.weight": OTHER}, f"{LAYER}embed_tokens.weight differs from model.embed_tokens.weight"),
        ({"shared_head.head.weight": OTHER}, f"{LAYER}shared_head.head.weight differs from lm_head.weight"),
        ({"enorm.weight": None}, f"1 missing: {LAYER}enorm.weight"),
        ({"self_attn.extra.weight": [4]}, f"1 unexpected: {LAYER}self_attn.extra.weight"),
        ({"eh_proj.weight": [32, 32]}, f"{LAYER}eh_proj.weight [32, 32] instead of [32, 64]"),
    ],
    ids=["embedding", "head", "missing", "unexpected", "shape"],
)
def test_what_does_not_fit_is_refused(
    changed: dict[str, Any], expected: str, sources, ranks: RankPool, tmp_path: Path
) -> None:
    source = sources["deepseek_v3"]
    other = tensors_in(source)["lm_head.weight"] + 1e-3
    made = with_further_layer(
        source,
        tmp_path / "source",
        **{name: other if how is OTHER else how and torch.zeros(how) for name, how in changed.items()},
    )
    code, message = run_import(ranks, made, tmp_path / "run", verify=False)
    assert code == 2 and expected in message, message
    assert not (tmp_path / "run").exists()


def test_config_json_may_name_a_layer_that_is_not_stored(sources, ranks: RankPool, tmp_path: Path) -> None:
    """As after save_pretrained of Transformers. More layers than it names are refused."""
    source = with_tensors(sources["deepseek_v3"], tmp_path / "source", {}, num_nextn_predict_layers=1)
    code, printed = run_import(ranks, source, tmp_path / "run")
    assert code == 0 and "num_nextn_predict_layers=1, but there are no tensors" in printed, printed
    code, printed = run_export(ranks, tmp_path / "run", tmp_path / "back")
    assert code == 0 and "verified on" in printed, printed
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    source = with_further_layer(sources["deepseek_v3"], tmp_path / "more")
    written = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (source / "config.json").write_text(json.dumps(written))
    code, message = run_import(ranks, source, tmp_path / "other", verify=False)
    assert code == 2 and "num_nextn_predict_layers=0, but there are tensors of 1" in message, message
