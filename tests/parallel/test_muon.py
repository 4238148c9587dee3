"""Muon against float64 loops over every matrix, and against torch's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from parallel.muon import COEFFICIENTS, newton_schulz, replace_by_directions
from tests.parallel.helpers import OPTIM, Variant, build_engine, gradients, my_batches, weights

MUON = replace(OPTIM, name="muon", weight_decay=0.1)
GATED = Variant(
    {"activation": "swiglu", "attention_bias": True},
    {"every": 2, "num_shared_experts": 1, "shared_expert_gate": True, "expert_bias": True, "router_bias": True},
)
LATENT = Variant({"num_query_groups": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
                  "v_head_dim": 8, "q_lora_rank": 20, "activation": "gelu"}, {"first_dense_layers": 1})  # fmt: skip


def direction(matrix: Tensor) -> Tensor:
    """0.2 sqrt(max(R, C)) U f(S) V^T, of the singular values themselves, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (matrix.double().norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(matrix.shape) ** 0.5 * (u * s) @ v


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (4, 40, 5), (1, 1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape, scale):
    x_NRC = scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([direction(x) for x in x_NRC]) / (0.2 * max(shape[1:]) ** 0.5)
    torch.testing.assert_close(newton_schulz(x_NRC), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(newton_schulz(x_NRC.float()), wanted.float(), rtol=1e-3, atol=1e-3)
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0  # of an expert without tokens
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)


def test_an_update_has_the_rms_of_adamw():
    """arXiv:2502.16982, section 2.2: the root of the mean square of an orthogonal matrix's elements is
    1 / sqrt(max(R, C))."""
    x = torch.randn(3, 64, 200, generator=torch.Generator().manual_seed(0))
    matrices = [x[0], x[1], x[2, :, :64]]
    replace_by_directions(matrices)
    assert all(0.15 < matrix.square().mean().sqrt() < 0.25 for matrix in matrices)


def test_the_step_is_that_of_torch():
    """torch.optim.Muon, which iterates in bf16: three steps of a tall and a wide matrix."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((48, 20), (20, 48)):
        weight = nn.Parameter(torch.randn(shape, generator=generator))
        start, mine, momentum = weight.detach().clone(), weight.detach().clone(), torch.zeros(shape)
        theirs = torch.optim.Muon([weight], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=generator)
            momentum = 0.95 * momentum + weight.grad
            theirs.step()
            update = weight.grad + 0.95 * momentum
            replace_by_directions([update])
            mine = (1 - 0.1 * 0.1) * mine - 0.1 * update
        assert (mine - weight).norm() < 0.02 * (weight - start).norm()


def matrices_by_hand(name: str, whole: Tensor, split_heads: bool) -> list[Tensor] | None:
    """Views of the matrices of a parameter of the tiny model, 2-dimensional; None: AdamW's."""
    if name.split(".")[0] != "layers" or whole.dim() == 1 or "router" in name or ".b_" in name:
        return None
    if name.endswith("qkv.weight"):
        if not split_heads:
            return [whole]
        # Two groups of two queries of width 8, a key and a value each.
        rows = torch.arange(64).view(2, 32)
        return [whole[rows[:, a:b].flatten()] for a, b in ((0, 16), (16, 24), (24, 32))]
    if name.endswith("experts.w_in"):
        return [whole[e, :, g] for e in range(whole.shape[0]) for g in range(whole.shape[2])]
    if name.endswith("experts.w_out"):
        return list(whole)
    return None if name.endswith("shared.gate") else [whole]


def joined(name: str, parts: list[Tensor], like: Tensor) -> Tensor:
    """The parameter of these matrices."""
    if name.endswith("qkv.weight") and len(parts) == 3:
        return torch.cat([part.view(2, -1, like.shape[1]) for part in parts], 1).view(like.shape)
    if name.endswith("experts.w_in"):
        return torch.stack(parts).view(like.shape[0], like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)
    return torch.stack(parts).view(like.shape)


@pytest.mark.parametrize("split_heads", [True, False])
@pytest.mark.parametrize("variant", [GATED, LATENT], ids=["gated", "latent"])
def test_every_parameter_is_updated_as_it_should(runtime, variant, split_heads):
    """Three steps in float64, from the gradients of each; AdamW by its formulas."""
    optim = replace(MUON, muon_split_qkv=split_heads, clip_grad=0.5, muon_momentum=0.9)
    engine = build_engine(runtime, variant, optim)
    wanted = {name: weight.double() for name, weight in weights(engine).items()}
    zeros = {name: torch.zeros_like(weight) for name, weight in wanted.items()}
    momentum, first, second = dict(zeros), dict(zeros), dict(zeros)
    by_muon = 0
    for step in range(1, 4):
        loss = engine.forward_backward(my_batches(runtime, step), step=step).item()
        found = {name: gradient.double() for name, gradient in gradients(engine).items()}
        norm = sum(gradient.square().sum() for gradient in found.values()).sqrt()
        assert norm > 0.5
        for name, gradient in found.items():
            g, w = gradient * 0.5 / (norm + 1e-6), wanted[name]
            momentum[name] = 0.9 * momentum[name] + g
            parts = matrices_by_hand(name, g + 0.9 * momentum[name], split_heads)
            if parts is None:
                first[name] = optim.beta1 * first[name] + (1 - optim.beta1) * g
                second[name] = optim.beta2 * second[name] + (1 - optim.beta2) * g**2
                root = (second[name] / (1 - optim.beta2**step)).sqrt()
                update = first[name] / (1 - optim.beta1**step) / (root + optim.eps)
            else:
                by_muon += 1
                update = joined(name, [direction(part) for part in parts], w)
            decay = 0.1 if w.dim() > 1 and ".b_" not in name else 0.0
            wanted[name] = w - 1e-2 * (update + decay * w)
        engine.update(1e-2, loss=loss)
        for name, weight in weights(engine).items():
            moved = 1e-2 * weight.numel() ** 0.5  # by about this
            assert (weight - wanted[name]).norm() < 2e-4 * moved, (step, name)
            wanted[name] = weight.double()
    assert by_muon == 3 * (4 * 2 + 2 * 3 + 2 * (2 + 3) if variant is GATED else 4 * 5 + 2 + 3 * 2)
