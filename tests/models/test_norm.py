import pytest
import torch

from models.norm import RMSNorm
from ops.norm import Norm, rms_norm_in_blocks, torch_rms_norm
from parallel.process_groups import Runtime
from tests.moe import reference
from tests.moe.helpers import assert_close, random


@pytest.mark.parametrize("function", [torch_rms_norm, rms_norm_in_blocks])
def test_equals_the_reference_output_and_gradients(function: Norm, runtime: Runtime, monkeypatch) -> None:
    """Rows of very different size, one so small that eps decides, and weights that are not 1; in blocks of
    three rows and of one."""
    monkeypatch.setattr("parallel.chunked_ops.CPU_VALUES", 18 // torch.get_num_threads())
    eps = 1e-3
    norm = RMSNorm(6, eps, function=function, dtype=torch.float32, sequence_parallel=False, groups=runtime.groups).to(
        runtime.device
    )
    weight_D = random(6, seed=1)
    norm.weight.data.copy_(weight_D)
    x_TD = random(4, 6) * torch.tensor([[1.0], [100.0], [0.01], [1.0]])
    above_TD = random(4, 6, seed=2)
    x64_TD, weight64_D = x_TD.double().requires_grad_(), weight_D.double().requires_grad_()
    wanted_TD = torch.stack([reference.rms_norm(x_D, weight64_D, eps) for x_D in x64_TD])
    (wanted_TD * above_TD).sum().backward()
    x_TD = x_TD.to(runtime.device).requires_grad_()
    out_TD = norm(x_TD)
    out_TD.backward(above_TD.to(runtime.device))
    assert_close(out_TD, wanted_TD)
    assert x_TD.grad is not None and x64_TD.grad is not None
    for got_D, wanted_D in zip(x_TD.grad, x64_TD.grad, strict=True):  # each row by its own size
        assert_close(got_D, wanted_D)
    assert_close(norm.weight.grad, weight64_D.grad)
