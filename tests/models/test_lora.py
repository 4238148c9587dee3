"""Low-rank adapters: the products that they add, in every precision and beside every product of the experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.parity_variants import DEEPSEEK, LORA_EXPERTS, MLA
from benchmarks.tiny import OPTIM, SEQUENCE, VOCABULARY, Variant, build_engine, gradients, my_batches, started
from conf import lora_layers, rules
from conf.lora_layers import adaptable_layers, adapted_kinds, adapted_layers, is_adapter
from conf.schema import CheckpointConfig, Config, LoraConfig, ModelConfig, MoeConfig, OptimConfig, ParallelConfig
from models.logits import next_token_logits
from ops.adapted_experts import Adapted, Factors, Product, frozen_product, loop_product
from ops.experts import loop_experts, torch_grouped_product
from ops.fp8_numerics import RECIPES
from ops.gemm_backend import Reference
from parallel.env import World
from parallel.layout import Layout
from parallel.local_launcher import RankPool
from training.adapters import adapter_parameters, run_cost
from training.flops import model_cost
from training.memory_estimate import memory_per_rank

DENSE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
VARIANTS = {
    "fp32": Variant({"attention_bias": True}, LORA_EXPERTS),
    "gates": Variant({"attention_output_gate": "head"}, {"num_experts": 0}),
    "latent": Variant(MLA | {"q_lora_rank": 20}, DEEPSEEK),
    "bf16": Variant(moe={"num_shared_experts": 1}, dtype=torch.bfloat16),
    "dora": Variant({"attention_output_gate": "head"}, {"num_experts": 0}),
    "dora latent": Variant(MLA | {"q_lora_rank": 20}, {"num_experts": 0}),
    "fp8": Variant(moe={"num_shared_experts": 1}, dtype=torch.bfloat16, gemm=Reference(RECIPES["blockwise"])),
}


def _logits(world: World, variant: Variant, lora: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(next-token logits after some steps, what has been trained), with B = 0 at first as in a run."""
    with started(world, ParallelConfig()) as runtime:
        # Without an optimizer nothing is frozen: torch folds products with a frozen weight differently.
        engine = build_engine(runtime, replace(variant, lora=lora), OPTIM if steps else None, b_std=0.0)
        for step in range(steps):
            loss = engine.forward_backward(my_batches(runtime, step), step=step).item()
            engine.update(1e-2, loss=loss)
        trained = gradients(engine) if steps else {}
        return next_token_logits(engine, VOCABULARY, [*range(SEQUENCE - 5)]), trained


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_begins_with_exactly_the_logits_of_its_base(name: str, ranks: RankPool) -> None:
    variant, dora = VARIANTS[name], name.startswith("dora")
    base, _ = ranks.run(1, _logits, variant, {}, 0, timeout=120.0)[0]
    begun, _ = ranks.run(1, _logits, variant, {"rank": 4, "dora": dora}, 0, timeout=120.0)[0]
    assert torch.equal(base, begun)
    after, trained = ranks.run(1, _logits, variant, {"rank": 4, "dropout": 0.2, "dora": dora}, 2, timeout=120.0)[0]
    assert not torch.equal(base, after) and after.isfinite().all()
    wanted = {layer.parameter(f) for layer in adaptable_layers(variant.config()) for f in "abm"[: 2 + dora]}
    assert trained.keys() == wanted and all(map(is_adapter, wanted))
    assert all(gradient.abs().max() > 0 for gradient in trained.values())


PRODUCTS: dict[str, Product] = {
    "loop": loop_product,
    "grouped_mm": torch_grouped_product,
    "gemm backend": frozen_product(Reference()),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
@pytest.mark.parametrize("counts", [[5, 0, 1, 8], [0, 0, 0, 0]])
def test_adapters_of_experts_are_updates_of_their_weights(product: Product, counts: list[int]) -> None:
    """Against the reference of the experts in float64, with the updates added to the weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-2] ** 0.5

    x, w_in, w_out, b_in = draw(sum(counts), 16), draw(4, 16, 2, 24), draw(4, 24, 16), draw(4, 2, 24)
    factors = {part: (draw(4, 24 if part == "down" else 16, 8), draw(4, 8, 16 if part == "down" else 24)) for part in
               ("gate", "up", "down")}  # fmt: skip
    leaves = [t.clone().requires_grad_() for pair in factors.values() for t in pair]
    update = [0.5 * a @ b for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    x64 = x.clone().requires_grad_()
    merged = (w_in + torch.stack(update[:2], dim=2), w_out + update[2])
    wanted = loop_experts(x64, counts, *merged, "swiglu", b_in)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [x64, *leaves])

    ours = [t.detach().float().requires_grad_() for t in (x, *leaves)]
    found = [Factors(a, b, 0.5) for a, b in zip(ours[1::2], ours[2::2], strict=True)]
    how = ("swiglu", b_in.float(), None, found[:2], found[2])
    got = Adapted(product)(ours[0], counts, w_in.float(), w_out.float(), *how)
    got_grads = torch.autograd.grad(got.square().sum(), ours)
    for one, other in zip([got, *got_grads], [wanted, *wanted_grads], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4)


def _config(**lora: Any) -> Config:
    moe = MoeConfig(num_experts=4, top_k=2, every=2, num_shared_experts=1)
    return Config(model=ModelConfig(**DENSE, moe=moe), lora=LoraConfig(**{"rank": 4, **lora}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, lora=LoraConfig(4, target=["*.attention.query"])), "nearest: *.attention"),
        (lambda c: replace(c, lora=LoraConfig(4, target=["layers.0.ffn.experts.up"])), "*.ffn.experts.up"),
        (lambda c: replace(c, lora=LoraConfig(4, target=["*.out", "!*"])), "none is left"),
        (lambda c: replace(c, lora=LoraConfig(17)), "attention.k is 16 x 32; nearest: lora.rank=16"),
        (lambda c: replace(c, lora=LoraConfig(0)), "lora.rank >= 1"),
        (lambda c: replace(c, lora=LoraConfig(alpha=2.0)), "lora.alpha needs lora.rank"),
        (lambda c: replace(c, optim=OptimConfig(frozen=["embedding.weight"])), "optim.frozen must be empty"),
        (
            lambda c: replace(c, checkpoint=CheckpointConfig(load="runs/x", load_except=["model.num_layers"])),
            "frozen weights that are new would stay random; nearest: checkpoint.load_except=[]",
        ),
        (lambda c: replace(c, lora=LoraConfig(4, dora=True)), "no DoRA for routed experts; nearest: lora.target="),
        (lambda c: replace(c, lora=LoraConfig(4, dora=True, dropout=0.1)), "lora.dora needs lora.dropout=0"),
        (lambda c: replace(c, optim=OptimConfig(name="muon")), "Muon would orthogonalize the factors"),
        (
            lambda c: replace(c, model=replace(c.model, moe=replace(c.model.moe, bias_update_rate=0.1))),
            "lora.rank needs model.moe.bias_update_rate=0",
        ),
    ],
)
def test_what_adapters_cannot_do_is_refused(change: Callable[[Config], Config], said: str) -> None:
    rules.check(_config(), 1)
    with pytest.raises(ValueError) as error:
        rules.check(change(_config()), 1)
    assert said in str(error.value), str(error.value)


def test_the_last_matching_pattern_decides() -> None:
    model = _config().model
    found = adapted_layers(model, LoraConfig(4, target=["*", "!*.ffn.*", "layers.1.ffn.experts.down"]))
    assert [x.name for x in found if "ffn" in x.name] == ["layers.1.ffn.experts.down"]
    assert [x.name.split(".")[-1] for x in found][:4] == ["q", "k", "v", "out"]


def test_layers_are_matched_once_for_all_candidates_of_a_plan() -> None:
    """And what is alike together is the same layers."""
    config = _config()
    config.lora = LoraConfig(3, target=["*.attention.*", "layers.1.*", "!*.v"])
    lora_layers._selected.cache_clear()
    with mock.patch.object(lora_layers.fnmatch, "filter", wraps=lora_layers.fnmatch.filter) as matched:
        for micro_batch in (1, 2, 4):
            config.train.micro_batch_size = micro_batch
            memory_per_rank(config, Layout(1), bf16=True, on_gpu=False)
        layers, kinds = (of(config.model, config.lora) for of in (adapted_layers, adapted_kinds))
    assert matched.call_count == len(config.lora.target)
    apart = {replace(k.layer, name=f"layers.{block}.{k.layer.name}") for k in kinds for block in k.blocks}
    assert apart == set(layers) and sum(len(kind.blocks) for kind in kinds) == len(layers)
    assert all(config.model.is_sparse(block) == kind.sparse for kind in kinds for block in kind.blocks)


def test_memory_and_flops_count_adapters_and_no_gradients_of_the_base() -> None:
    lora, plain = _config(), _config()
    plain.lora = LoraConfig()
    spread, experts = adapter_parameters(lora, Layout(1))
    # Attention of both layers, the dense layer, the shared expert; then the four experts of layer 1.
    attention = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))
    assert (spread, experts) == (attention + 2 * 4 * 3 * (32 + 48), 4 * 4 * 3 * (32 + 48))
    memory, whole = (memory_per_rank(c, Layout(1), bf16=True, on_gpu=False) for c in (lora, plain))
    assert memory.gradients == 4 * (spread + experts) and memory.optimizer == 12 * (spread + experts)
    assert memory.weights == whole.weights + 2 * (spread + experts)
    cost, trained = run_cost(lora), model_cost(lora.model, lora.train.sequence_length)
    assert cost.total == trained.total + spread + experts
    assert 4 / 6 < cost.flops_per_token / trained.flops_per_token < 0.9
    halved = replace(lora, parallel=ParallelConfig(tp=2))
    shares = adapter_parameters(halved, Layout.of(halved.parallel, 2))
    # Of every pair the factor on the sharded side is halved.
    assert shares[0] == attention - 2 * 4 * (16 + 2 * 8 + 16) + 2 * 4 * 3 * (32 + 24)
