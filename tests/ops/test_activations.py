"""The clamped SwiGLU: its values and gradients, and what happens where a kernel does not have it."""

import pytest
import torch

from conf.schema import ModelConfig
from ops.activations import activate, activate_again
from ops.experts import EXPERTS, activation_missing
from ops.registry import candidates
from parallel.process_groups import Runtime
from tests.moe.helpers import random, run_context, tiny


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.8, 1.1)])
def test_clamped_swiglu_and_its_gradients(alpha: float, limit: float) -> None:
    model = ModelConfig(activation="clamped_swiglu", swiglu_alpha=alpha, swiglu_limit=limit)
    h_RGF = (6 * random(50, 2, 7)).double().requires_grad_()
    assert (h_RGF.abs() > limit).any() and (h_RGF.abs() < limit).any()
    gate, up = h_RGF[:, 0].clamp(max=limit), h_RGF[:, 1].clamp(-limit, limit)
    wanted = (up + 1) * gate * torch.sigmoid(alpha * gate)
    above = random(50, 7, seed=1).double()
    (gradient,) = torch.autograd.grad(wanted, h_RGF, above)
    got = activate(h_RGF.unbind(1), model.activation_name)
    again, of_h = activate_again(h_RGF.detach(), above, model.activation_name)
    for one in (got, again):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)
    for one in (torch.autograd.grad(got, h_RGF, above)[0].flatten(1), of_h):
        torch.testing.assert_close(one, gradient.flatten(1), rtol=1e-12, atol=1e-12)


def test_kernels_that_do_not_have_it_say_so(runtime: Runtime) -> None:
    context = run_context(tiny(activation="clamped_swiglu"), runtime)
    assert activation_missing(context) == "has no activation clamped_swiglu"
    assert activation_missing(run_context(tiny(activation="swiglu"), runtime)) is None
    reasons = {i.name: i.unsupported_reason(context) for i in candidates(EXPERTS) if i.name in ("native", "triton")}
    assert all(reasons.values()), reasons
