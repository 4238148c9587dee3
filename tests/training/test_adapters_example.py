"""The example of docs/guides/adapters.md, command by command: the default model, with fewer and shorter steps."""

import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.published import composed
from conf.commands import InferenceConfig
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import run_export
from tests.training.helpers import ROOT, train, write_corpus

SECONDS = 240.0
SMALL = "train.steps=2 train.global_batch_size=2 train.micro_batch_size=2 train.sequence_length=64 model.vocab_size=320"
SMALL += " eval.sample_tokens=0 eval.final_batches=1 data=text precision=fp32 optim.warmup_steps=0 optim.lr=1e-2"


def logits(world: World, run: str, ids: list[int]) -> Tensor:
    """Ours, of a sequence (rank function)."""
    from models.logits import sequence_logits
    from training.load_checkpoint import load_model

    with load_model(run, InferenceConfig(precision="fp32"), world) as loaded:
        return sequence_logits(loaded.built.engine, loaded.built.config.model.vocab_size, ids)


def test_the_merged_export_of_the_example_computes_what_the_run_does(ranks: RankPool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    guide = (ROOT / "docs" / "guides" / "adapters.md").read_text()
    block = guide.split("## An example")[1].split("```bash\n")[1].split("```")[0]
    corpus = [f"data.files=[{write_corpus(tmp_path)}]", f"data.cache_dir={tmp_path / 'cache'}"]
    commands = [shlex.split(line.replace("runs/", f"{tmp_path}/")) for line in block.splitlines()]
    assert ["launch.export_hf" in words for words in commands] == [False, False, True, True]
    for words in commands:
        if "launch.export_hf" not in words:
            config = composed([*words[2:], *SMALL.split(), *corpus])
            assert ranks.run(1, train, config, timeout=SECONDS) == [0]
            continue
        given = dict(word.split("=") for word in words[3:])
        run, output = Path(given.pop("checkpoint")), tmp_path / given.pop("output")
        code, said = run_export(ranks, run, output, **{name: value == "true" for name, value in given.items()})
        assert code == 0 and "verified on" in said, said

    ids = [*range(7, 57)]
    of_base, of_run = (ranks.run(1, logits, str(tmp_path / name), ids, timeout=SECONDS)[0] for name in ("base", "lora"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        merged = model(torch.tensor([ids])).logits[0]
    bound = 1e-4 * of_run.abs().max().item()
    assert (of_base - of_run).abs().max() > 100 * bound  # the adapters do something
    torch.testing.assert_close(merged, of_run, rtol=0, atol=bound)
