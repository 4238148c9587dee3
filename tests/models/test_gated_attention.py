"""Gates on what attention puts out, against the attention of Transformers' Qwen3-Next."""

import pytest
import torch
from torch import Tensor

from models.attention import Attention
from models.megatron_config import transformer_config
from models.rope import Rotary
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, tiny

transformers = pytest.importorskip("transformers")

HEADS, GROUPS, WIDTH, HIDDEN, SEQUENCE, BATCH = 4, 2, 6, 16, 7, 2
QUERIES = HEADS // GROUPS


def by_group(q_proj: Tensor, k_proj: Tensor, v_proj: Tensor) -> Tensor:
    """Rows of our projection from theirs, whose rows for queries are those of each head before its gates."""
    q, gate = q_proj.unflatten(0, (GROUPS, QUERIES, 2, WIDTH)).unbind(2)
    k, v = (t.unflatten(0, (GROUPS, WIDTH)) for t in (k_proj, v_proj))
    return torch.cat([q.flatten(1, 2), gate.flatten(1, 2), k, v], 1).flatten(0, 1)


def test_gates_are_those_of_qwen3_next(runtime: Runtime) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH}
    config = transformers.Qwen3NextConfig(**sizes, attn_implementation="eager")
    theirs = Qwen3NextAttention(config, 0)
    model = tiny(
        **{"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_query_groups": GROUPS, "head_dim": WIDTH},
        **{"qk_norm": "head", "norm_zero_centered": True, "norm_eps": config.rms_norm_eps},
        attention_output_gate="elementwise",
    )
    ours = Attention(model, transformer_config(model, runtime, torch.float32, deterministic=False), runtime.groups)
    parts = ("q_proj", "k_proj", "v_proj")
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=seed))
        ours.qkv.weight.copy_(by_group(*(getattr(theirs, part).weight for part in parts)))
        ours.out.weight.copy_(theirs.o_proj.weight)
        for name in "qk":
            getattr(ours, f"{name}_layernorm").weight.copy_(getattr(theirs, f"{name}_norm").weight)
    ours.to(runtime.device)
    cos, sin = Rotary(WIDTH, 100.0, SEQUENCE)(torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH))
    x_SBD, above_SBD = random(SEQUENCE, BATCH, HIDDEN, seed=8), random(SEQUENCE, BATCH, HIDDEN, seed=9)
    out_SBD = ours(x_SBD.to(runtime.device), cos.to(runtime.device), sin.to(runtime.device), None)
    out_SBD.backward(above_SBD.to(runtime.device))
    tables = tuple(torch.cat([t, t], -1)[:, :, 0].transpose(0, 1) for t in (cos, sin))
    mask = torch.full((SEQUENCE, SEQUENCE), -torch.inf).triu(1)[None, None]
    wanted_BSD, _ = theirs(x_SBD.transpose(0, 1), tables, mask)
    wanted_BSD.backward(above_SBD.transpose(0, 1))
    assert_close(out_SBD, wanted_BSD.transpose(0, 1).double())
    assert_close(ours.qkv.weight.grad, by_group(*(getattr(theirs, part).weight.grad for part in parts)).double())
    assert_close(ours.out.weight.grad, theirs.o_proj.weight.grad.double())
    for name in "qk":
        gradient = getattr(theirs, f"{name}_norm").weight.grad
        assert_close(getattr(ours, f"{name}_layernorm").weight.grad, gradient.double())
