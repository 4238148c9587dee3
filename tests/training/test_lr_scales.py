"""optim.router_lr_scale and optim.expert_lr_scale: the updates of routers and of experts, and of nothing else, grow in
proportion. That every layout trains the same model with them is in the parity matrix (olmoe, muon)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import MoeConfig
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import tensors_in
from tests.training.helpers import tiny_config, train, write_corpus


def after_one_step(
    ranks: RankPool, corpus: Path, run_dir: Path, optimizer: str, router: float, expert: float
) -> dict[str, torch.Tensor]:
    config = tiny_config(corpus, run_dir, steps=1)
    moe = MoeConfig(num_experts=4, every=2, top_k=2, router_bias=True, expert_bias=True, num_shared_experts=1)
    config.model = replace(config.model, moe=moe)
    config.optim = replace(config.optim, name=optimizer, router_lr_scale=router, expert_lr_scale=expert)
    assert ranks.run(1, train, config, timeout=120.0) == [0]
    found = tensors_in(run_dir / "checkpoints" / "step_00000001")
    return {k.removeprefix("weights."): v.double() for k, v in found.items() if k.startswith("weights.")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_are_in_proportion(optimizer: str, ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    factors = {"one": (1.0, 1.0), "some": (3.0, 5.0), "more": (7.0, 13.0)}
    one, some, more = (
        after_one_step(ranks, corpus, tmp_path / name, optimizer, *pair) for name, pair in factors.items()
    )
    routers = {f"layers.1.ffn.router.{name}" for name in ("weight", "logit_bias")}
    experts = {f"layers.1.ffn.experts.{name}" for name in ("w_in", "w_out", "b_in", "b_out")}
    assert {name for name in one if not torch.equal(one[name], some[name])} == routers | experts
    for names, short, long in ((routers, 2.0, 6.0), (experts, 4.0, 12.0)):
        for name in names:  # the update itself is not known, but two of its multiples are
            update = (some[name] - one[name]) / short
            assert update.abs().max() > 1e-6
            torch.testing.assert_close((more[name] - one[name]) / long, update, rtol=1e-3, atol=1e-7)
