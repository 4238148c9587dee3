"""Optimizer states in host memory and in bf16 on the GPU."""

from dataclasses import replace

import pytest
import torch

from parallel import optimizer_state
from parallel.block_update import in_torch
from parallel.optimizers import OPTIMIZERS
from tests.ops import test_adamw as tests_adamw
from tests.parallel.helpers import OPTIM, Variant, build_engine, optimizer_tensors, train
from tests.parallel.test_optimizer_state import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
BF16 = Variant(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "changes",
    [{}, {"state_dtype": "bf16", "grad_dtype": "bf16"}, {"name": "muon", "state_dtype": "bf16"}],
    ids=["fp32", "bf16", "muon"],
)
def test_offloaded_states_lie_in_pinned_memory_and_change_no_bit(runtime, monkeypatch, changes):
    monkeypatch.setattr("parallel.block_adamw.GPU_BLOCK", 512)  # many blocks on both streams
    found = []
    for offload in (False, True):
        engine = build_engine(runtime, BF16, replace(OPTIM, clip_grad=0.5, cpu_offload=offload, **changes))
        told = train(engine, range(4))
        found.append((told, optimizer_tensors(engine)))
    assert found[0][0] == found[1][0]
    assert_same_bits(found[1][1], found[0][1])
    for parameter, piece in optimizer_state._optimizer_shards(engine).items():
        kept = list(piece.inner.state[piece.master].values())
        kept += [piece.master.data] if parameter.dtype == torch.bfloat16 else []
        assert all(t.device.type == "cpu" and t.is_pinned() for t in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_updates_as_torch_does(dtype):
    """On the GPU and, by torch alone, on the CPU: the random bits are the same."""
    from ops.triton.adamw import update

    blocks = [tests_adamw.block(device, dtype, 5000) for device in ("cpu", "cuda", "cuda")]
    for block, function in zip(
        blocks, (in_torch(OPTIMIZERS["adamw"]), in_torch(OPTIMIZERS["adamw"]), update), strict=True
    ):
        function(block)
    tests_adamw.assert_alike(blocks[1], blocks[0])
    tests_adamw.assert_alike(blocks[2], blocks[0])
