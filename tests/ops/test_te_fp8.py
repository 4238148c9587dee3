"""FP8 by TransformerEngine's recipes and autocast, with a stand-in for the package."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import Fp8Config, ModelConfig, MoeConfig, ParallelConfig
from ops.experts import LOOP
from ops.operation import Row
from ops.te_fp8 import TE_FP8, TransformerEngineFp8, forget_held
from parallel import batch_context
from parallel.checkpoint import Checkpointer
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.moe.helpers import run_context, selected
from tests.parallel.helpers import Variant, build_engine, started, state, train
from tests.stand_ins import installed
from tests.stand_ins.signatures import table
from tests.stand_ins.versions import as_version

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


@pytest.fixture
def stand_in() -> Iterator[Any]:
    """Its module quantization."""
    with installed("transformer_engine"):
        from transformer_engine.pytorch import quantization

        yield quantization


def chosen(runtime: Any, recipe: str, **fp8: Any) -> tuple[TransformerEngineFp8, Row]:
    model = ModelConfig(hidden_size=64, ffn_hidden_size=64, moe=MoeConfig(num_experts=4))
    how = Fp8Config(kernels="te", recipe=recipe, **fp8)
    return selected(TE_FP8, run_context(model, runtime, torch.bfloat16, precision="fp8", fp8=how))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_its_trial(runtime, stand_in, recipe):
    from transformer_engine.common import recipe as recipes

    fp8, row = chosen(runtime, recipe)
    kinds = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling"}
    kinds |= {"blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    assert type(fp8.recipe).__name__ == kinds[recipe]
    hybrid = recipe in ("delayed", "tensorwise")
    assert fp8.recipe.fp8_format is (recipes.Format.HYBRID if hybrid else recipes.Format.E4M3)
    assert row.name == f"TransformerEngine 2.18.0, {recipe}, {'hybrid' if hybrid else 'e4m3'}"
    assert not stand_in.FP8GlobalStateManager.buffers  # of the trial's layers nothing is left


def test_the_settings_of_delayed_scaling_reach_the_recipe(runtime, stand_in):
    fp8, _ = chosen(runtime, "delayed", amax_history_len=3, amax_compute_algo="most_recent", format="e4m3")
    assert (fp8.recipe.amax_history_len, fp8.recipe.amax_compute_algo) == (3, "most_recent")
    assert fp8.recipe.fp8_format.name == "E4M3" and fp8.history == 3


LACKS = [
    ("mxfp8", (9, 0), "is not for this GPU", "blockwise"),
    ("mxfp8", (12, 0), "is not for this GPU", "blockwise"),
    ("blockwise", (8, 9), "is not for this GPU", "tensorwise"),
    ("delayed", (8, 0), "is not for this GPU", None),
]


@pytest.mark.parametrize(("recipe", "capability", "why", "nearest"), LACKS)
def test_a_recipe_that_the_gpu_lacks(runtime, stand_in, recipe, capability, why, nearest):
    stand_in.CAPABILITY = capability
    with pytest.raises(ValueError, match=f"fp8.kernels=te: fp8.recipe={recipe} {why}") as error:
        chosen(runtime, recipe)
    assert f"nearest: {f'fp8.recipe={nearest}' if nearest else 'fp8.kernels=auto'}" in str(error.value)


def test_a_recipe_that_the_version_lacks(runtime, stand_in):
    from transformer_engine.common import recipe as recipes

    del recipes.Float8BlockScaling
    lacks = (
        "fp8.recipe=blockwise needs TransformerEngine 2.3 or newer, and 2.18.0 is installed; nearest: fp8.recipe=mxfp8"
    )
    with pytest.raises(ValueError, match=lacks):
        chosen(runtime, "blockwise")


def test_without_the_package(runtime):
    if "transformer_engine" in sys.modules:
        pytest.skip("it is installed here")
    with pytest.raises(ValueError, match="needs the package transformer-engine, which is not installed"):
        chosen(runtime, "delayed")


def doubled(t: Tensor, *args: Any, real: Any, **how: Any) -> Tensor:
    return real(t, *args, **how) * 2


def unscaled_gradients(t: Tensor, module: Any, recipe: Any, way: str, index: int, *, real: Any, **how: Any) -> Tensor:
    y = real(t, module, recipe, way, index, **how)
    return y * 1.2 if way == "bwd" else y


@pytest.mark.parametrize("wrong", [doubled, unscaled_gradients])
@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_wrong_products_are_refused(runtime, stand_in, wrong, recipe):
    real = stand_in.rounded
    stand_in.rounded = lambda *args, **how: wrong(*args, real=real, **how)
    with pytest.raises(ValueError, match="differs from bf16 by"):
        chosen(runtime, recipe)


@pytest.mark.parametrize("version", table()["transformer_engine_fp8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recorded_version_takes_the_calls(runtime, stand_in, recipe, version):
    """Before 2.9 the autocast has another name and other parameters, and the state is elsewhere."""
    with as_version("transformer_engine_fp8", version) as called:
        chosen(runtime, recipe)
    older = version == "2.3.0"
    of_state = "transformer_engine.pytorch.fp8." if older else "transformer_engine.pytorch.quantization."
    assert f"transformer_engine.pytorch.{'fp8_autocast' if older else 'autocast'}" in called
    assert {"Linear.forward", "GroupedLinear.forward"} <= {".".join(name.split(".")[-2:]) for name in called}
    assert f"{of_state}FP8GlobalStateManager.reset" in called


def with_copies(layer: Any, w_LKN: Tensor, x_RK: Tensor, counts: list[int]) -> Tensor:
    weights = {f"weight{e}": w_KN.t().contiguous() for e, w_KN in enumerate(w_LKN)}
    return torch.func.functional_call(layer, weights, (x_RK, counts))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_experts_are_transposed_and_quantized_once_a_step(runtime, stand_in, monkeypatch, recipe):
    """Four experts, two steps of three micro-batches. The gradients are those of the package's layers that are given
    copies [N, K] of the weights in every micro-batch, bit for bit."""
    from transformer_engine.pytorch import GroupedLinear

    fp8, _ = chosen(runtime, recipe)
    copied, real = [], stand_in.rounded

    def rounded(t: Tensor, *args: Any, **how: Any) -> Tensor:
        if not t.is_contiguous():
            copied.append(t)
        return real(t, *args, **how)

    monkeypatch.setattr(stand_in, "rounded", rounded)
    counts, block = [48, 0, 16, 32], nn.Module()
    x_RD = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    block.w_in = nn.Parameter(torch.randn(4, 128, 1, 128, generator=torch.Generator().manual_seed(2)) / 11)
    block.w_out = nn.Parameter(torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(3)) / 11)
    for weight in block.parameters():
        fp8.grouped(weight, None)
    experts = fp8.experts(LOOP).run
    plain = [GroupedLinear(4, 128, 128, bias=False, params_dtype=torch.float32, device="meta") for _ in range(2)]
    with batch_context.entered(batch_context.DEFAULT_CONTEXT):
        for step in range(2):
            for micro_batch in range(3):
                x, before = x_RD * (1 + micro_batch), len(copied)
                y_RD = experts(x, counts, block.w_in, block.w_out, "relu")
                assert len(copied) - before == (2 * 4 * 2 if micro_batch == 0 else 0), (step, micro_batch)
                got = torch.autograd.grad(y_RD, [*block.parameters()], x)
                with fp8.inside():
                    h_RF = with_copies(plain[0], block.w_in.flatten(2), x, counts).relu()
                    wanted_RD = with_copies(plain[1], block.w_out, h_RF, counts)
                wanted = torch.autograd.grad(wanted_RD, [*block.parameters()], x)
                assert all(torch.equal(a, b) for a, b in zip([y_RD, *got], [wanted_RD, *wanted], strict=True))
            forget_held(block)
            with torch.no_grad():
                block.w_in.mul_(1.5)


SIZES = {"hidden_size": 64, "ffn_hidden_size": 64}
LATENT = {"num_query_groups": None, "kv_lora_rank": 32, "q_lora_rank": 32}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 16}
Trained = tuple[list[tuple[float, float]], dict[str, Tensor]]


def trained(
    world: World,
    parallel: ParallelConfig,
    fp8: dict[str, Any],
    folder: str | None,
    steps: range,
    keeps: bool = True,
    attention: dict[str, Any] | None = None,
) -> Trained:
    """Losses and gradient norms, and what delayed scaling keeps, of this rank; after the newest checkpoint in the
    folder where steps do not begin with 0, and with another afterwards (rank function).

    Args:
        keeps: whether the state of delayed scaling is used that was loaded.
    """
    with installed("transformer_engine"), started(world, parallel, amax=True) as runtime:
        model, moe = SIZES | (attention or {}), {"capacity_factor": None}
        variant = Variant(model=model, moe=moe, fp8=fp8, transformer_engine=bool(fp8))
        engine = build_engine(runtime, variant)
        checkpoints = Checkpointer(Path(folder), engine, keep=3) if folder else None
        if checkpoints and steps.start:
            checkpoints.resume(print)
        kept = {n: p for m in engine.modules for n, p in m.named_parameters() if ".fp8_state." in n}
        for name, p in kept.items() if not keeps else ():
            p.data.fill_(1.0 if "scale" in name else 0.0)
        losses = train(engine, steps)
        if checkpoints:
            checkpoints.save(state(steps.stop, world.size))
        return losses, {name: p.detach().clone() for name, p in kept.items()}


ONE = ParallelConfig()
DELAYED = {"recipe": "delayed", "amax_history_len": 4}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_trains_close_to_high_precision(ranks: RankPool, recipe: str) -> None:
    attention = LATENT if recipe == "mxfp8" else {}
    (wanted, _), (got, kept) = (ranks.run(1, trained, ONE, fp8, None, range(3), True, attention, timeout=120)[0]
                                for fp8 in ({}, {"recipe": recipe, "first_layers_high": 1}))  # fmt: skip
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in wanted], rel=0.02)
    assert all(a != b for (a, _), (b, _) in zip(got, wanted, strict=True))
    assert bool(kept) == (recipe == "delayed") and not any(name.startswith("layers.0.") for name in kept)


@pytest.mark.parametrize("parallel", [{"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"pp": 2}], ids=str)
def test_ranks_scale_by_the_amax_of_all(ranks: RankPool, parallel: dict[str, Any]) -> None:
    """The ranks that share a micro-batch have the scales that one rank alone has: no largest value is missed."""
    attention = LATENT if "tp" in parallel else {}
    how = DELAYED, None, range(1), True, attention
    _, wanted = ranks.run(1, trained, ONE, *how, timeout=120)[0]
    assert bool(attention) == any("kv_down.fp8_state" in name for name in wanted)
    for _, kept in ranks.run(2, trained, ParallelConfig(**parallel), *how, timeout=120):
        assert kept
        for name, value in kept.items():
            # Megatron-Core multiplies the loss by cp, with which FP8 rounds gradients otherwise in the first pass.
            if parallel.get("cp", 1) == 1 or name.endswith("_fwd"):
                torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-3)
            assert "scale" not in name or (value != 1).any()


def test_replicas_and_ranks_of_experts_have_one_scale(ranks: RankPool) -> None:
    first, second = (
        kept for _, kept in ranks.run(2, trained, ParallelConfig(ep=2), DELAYED, None, range(2), timeout=120)
    )
    assert any(name.endswith("in_scales.fp8_state.amax_fwd") for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_continues_bit_for_bit(ranks: RankPool, tmp_path: Path, recipe: str) -> None:
    fp8, where = {"recipe": recipe} | (DELAYED if recipe == "delayed" else {}), str(tmp_path)
    whole, kept = ranks.run(1, trained, ONE, fp8, None, range(4), timeout=120)[0]
    begun, _ = ranks.run(1, trained, ONE, fp8, where, range(2), timeout=120)[0]
    ended, kept_too = ranks.run(1, trained, ONE, fp8, where, range(2, 4), timeout=120)[0]
    assert begun + ended == whole
    assert all(torch.equal(value, kept_too[name]) for name, value in kept.items())


def test_the_scales_open_under_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Each expert takes its own along. Without them the losses are others."""
    where = str(tmp_path)
    whole, _ = ranks.run(1, trained, ONE, DELAYED, None, range(3), timeout=120)[0]
    ranks.run(1, trained, ONE, DELAYED, where, range(2), timeout=120)
    layout = ParallelConfig(tp=2, sequence_parallel=True, ep=2)
    again = ranks.run(2, trained, layout, DELAYED, where, range(2, 3), True, timeout=120)[0][0]
    assert again[0][0] == pytest.approx(whole[2][0], rel=1e-4)
    (tmp_path / "step_00000003").rename(tmp_path / "aside")
    anew = ranks.run(2, trained, layout, DELAYED, where, range(2, 3), False, timeout=120)[0][0]
    assert abs(anew[0][0] / whole[2][0] - 1) > abs(again[0][0] / whole[2][0] - 1)
