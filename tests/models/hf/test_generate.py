"""Greedy text of imported models is that of Transformers' `generate`, in a batch of prompts of unequal length, past the
size of windows and chunks, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conf.commands import InferenceConfig
from conf.schema import ParallelConfig
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import VOCABULARY
from training.load_checkpoint import load_model

PROMPTS = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 23, 1, 12)]
TOKENS = 30
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v2", "gpt_oss", "llama4", "phimoe_plain", "granitemoe"]
FAMILIES += ["olmoe", "glm4_moe"]


def ours(world: World, run: str, degrees: dict[str, Any]) -> list[list[int]]:
    """Greedy continuations of all prompts."""
    here = InferenceConfig(precision="fp32", parallel=ParallelConfig(**degrees))
    with load_model(run, here, world) as loaded:
        from training.generate import Continuation, Sampling, continue_batch

        batch = [Continuation(prompt, index) for index, prompt in enumerate(PROMPTS)]
        for _ in continue_batch(loaded.built, batch, Sampling(TOKENS)):
            pass
        return [continuation.ids for continuation in batch]


def theirs(source: Path) -> list[list[int]]:
    """One by one: what Transformers does with padding is not what is tested."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval()
    length = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **length}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(name: str, sources: Any, runs: Any, ranks: RankPool) -> None:
    wanted = theirs(sources[name])
    assert len({tuple(ids) for ids in wanted}) == len(PROMPTS)
    assert ranks.run(1, ours, str(runs[name]), {}, timeout=120.0)[0] == wanted


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"ep": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_several_ranks_write_the_same(
    name: str, degrees: dict[str, int], sources: Any, runs: Any, ranks: RankPool
) -> None:
    wanted = theirs(sources[name])
    assert ranks.run(2, ours, str(runs[name]), degrees, timeout=120.0) == [wanted, wanted]
