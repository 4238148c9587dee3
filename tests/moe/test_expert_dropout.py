"""Expert dropout: which units, in which passes; that no layout changes them is in tests/parallel."""

import pytest
import torch
from torch import Tensor

from conf.schema import MoeConfig
from moe.counter_rng import key
from moe.expert_dropout import Dropout, name_choices
from parallel.batch_context import EVALUATE, GENERATE, BatchContext
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import (
    EVERY_BACKEND,
    assert_close,
    assert_gradients_close,
    in_float64,
    random,
    run_layer,
    sparse_layer,
    tiny,
)

MOE = MoeConfig(num_experts=4, top_k=2, capacity_factor=None, expert_dropout=0.4, aux_loss_coeff=0.0, z_loss_coeff=0.0)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_equals_the_reference(backend: str, runtime: Runtime) -> None:
    layer = sparse_layer(tiny(MOE), runtime, backend=backend, seed=3)
    x_SBD, weights, seed = random(5, 2, 8), in_float64(layer), 3

    experts = reference.sparse_layer(x_SBD.double().flatten(0, 1), weights, MOE, "geglu", None, 2).experts

    def keep(token: int, choice: int) -> Tensor:
        # Micro-batch 7 of 10 tokens, each with 4 experts or none.
        name = torch.tensor([(7 * 10 + token) * 5 + experts[token][choice]])
        named = key(seed, "expert dropout", 11, 0)
        return Dropout(0.4, named, name, 12).factors(slice(None), 0, 1, torch.float64)[0]

    wanted = reference.sparse_layer(x_SBD.double().flatten(0, 1), weights, MOE, "geglu", None, None, keep)
    wanted.out_TD.square().sum().backward()
    out_SBD = run_layer(layer, x_SBD.to(runtime.device), BatchContext(step=11, micro_batch=7))
    out_SBD.square().sum().backward()
    assert_close(out_SBD, wanted.out_TD.view(x_SBD.shape))
    assert_gradients_close(layer, weights)


def test_other_passes_draw_other_units_and_only_training_draws(runtime: Runtime) -> None:
    layer, x_SBD = sparse_layer(tiny(MOE), runtime), random(5, 2, 8).to(runtime.device)
    passes = [BatchContext(step=s, micro_batch=m) for s, m in ((0, 0), (1, 0), (0, 1))]
    outputs = [run_layer(layer, x_SBD, batch_ctx) for batch_ctx in passes]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(run_layer(layer, x_SBD, passes[1]), outputs[1])
    whole = sparse_layer(tiny(MoeConfig(num_experts=4, top_k=2, capacity_factor=None)), runtime)
    for mode in (EVALUATE, GENERATE):
        assert torch.equal(run_layer(layer, x_SBD, BatchContext(mode)), run_layer(whole, x_SBD, BatchContext(mode)))


def test_the_share_and_the_mean_are_as_asked() -> None:
    factors_RF = Dropout(0.4, 5, torch.arange(1000), 200).factors(slice(None), 0, 1, torch.float32)
    assert set(factors_RF.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert (factors_RF == 0).float().mean().item() == pytest.approx(0.4, abs=0.005)
    # No unit is dropped more often than others, and no row.
    assert (factors_RF == 0).float().mean(0).sub(0.4).abs().max() < 0.08
    assert (factors_RF == 0).float().mean(1).sub(0.4).abs().max() < 0.15


def test_parts_of_the_width_and_of_the_rows_are_cut_out_of_the_whole() -> None:
    dropout = Dropout(0.5, 5, torch.arange(6), 8)
    whole_RF = dropout.factors(slice(None), 0, 1, torch.float32)
    halves = [dropout.factors(slice(2, 5), part, 2, torch.float32) for part in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole_RF[2:5])


def test_every_choice_of_a_step_has_a_name_of_its_own() -> None:
    experts_TK = torch.tensor([[0, 1], [2, 0], [2, 1]])
    places = [(micro_batch, part) for micro_batch in range(2) for part in range(4)]
    names = [name_choices(experts_TK, 3, part=p, parts=4, micro_batch=m).flatten().tolist() for m, p in places]
    assert names[0] == [0, 1, 6, 4, 10, 9]
    assert len({name for some in names for name in some}) == 8 * 6
    # However the micro-batch is cut: the second token of the second of two parts is the fourth of the whole.
    (whole,) = name_choices(experts_TK[:1].expand(4, 2), 3, part=0, parts=1, micro_batch=1)[3:].tolist()
    assert name_choices(experts_TK[:1].expand(2, 2), 3, part=1, parts=2, micro_batch=1)[1].tolist() == whole
