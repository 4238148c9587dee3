"""The sparse layer against the sparse layers of other projects, with the same weights: output, gradients and losses.

Legend: E experts, D hidden, F expert hidden, S sequence, B batch.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import MoeConfig
from moe.layer import MoELayer
from ops.routing import router_logits
from parallel.batch_context import BatchContext
from parallel.megatron_compat import moe_layer
from parallel.process_groups import Runtime
from tests.moe.helpers import assert_close, random, run_layer, sparse_layer, tiny

HIDDEN, FFN, EXPERTS = 16, 24, 12
SEQUENCE, BATCH = 16, 2
LOSS_SCALE = 0.37


def as_linear(w_in_EDGF: Tensor, w_out_EFD: Tensor) -> tuple[Tensor, Tensor]:
    """Expert weights, or their gradients, as others keep them: [E, gate and up after one another, D] and [E, D, F]."""
    return w_in_EDGF.permute(0, 2, 3, 1).flatten(1, 2), w_out_EFD.transpose(1, 2)


@dataclass
class Passed:
    """What a forward and backward pass left."""

    out_SBD: Tensor
    x_grad_SBD: Tensor
    router_grad_ED: Tensor
    into_grad: Tensor
    """[E, 2 F, D]"""
    down_grad: Tensor
    """[E, D, F]"""
    shared_grad: Tensor
    """Of the shared experts' gate and up, down, and their own gate, flattened after one another."""

    def assert_equals(self, other: "Passed") -> None:
        for name, value in vars(self).items():
            try:
                assert_close(value, getattr(other, name).detach().cpu().double())
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def sparse(moe: MoeConfig, runtime: Runtime) -> MoELayer:
    model = tiny(moe, hidden_size=HIDDEN, ffn_hidden_size=FFN, activation="swiglu", init_scale=1.0)
    return sparse_layer(model, runtime)


def inputs(runtime: Runtime) -> tuple[Tensor, Tensor]:
    """The layer's input and the gradient from above, [S, B, D]."""
    x_SBD, above_SBD = (random(SEQUENCE, BATCH, HIDDEN, seed=seed).to(runtime.device) for seed in (5, 6))
    return x_SBD.requires_grad_(), above_SBD


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1), *(w.flatten().cpu() for w in weights)])


def shared_weights(layer: MoELayer) -> list[nn.Parameter]:
    """Ours: [gate, up, down and the gate over all], as far as there are any."""
    if layer.shared is None:
        return []
    ffn, gate = layer.shared.ffn, layer.shared.gate
    return [ffn.gate.weight, ffn.up.weight, ffn.down.weight] + ([] if gate is None else [gate])


def pass_through(layer: MoELayer, runtime: Runtime) -> Passed:
    x_SBD, above_SBD = inputs(runtime)
    out_SBD = run_layer(layer, x_SBD, BatchContext(loss_scale=LOSS_SCALE))
    out_SBD.backward(above_SBD)
    experts = as_linear(layer.experts.w_in.grad, layer.experts.w_out.grad)
    shared = flat([w.grad for w in shared_weights(layer)])
    return Passed(out_SBD, x_SBD.grad, layer.router.weight.grad, *experts, shared)


def logged(layer: MoELayer, name: str) -> float:
    return layer.statistics.sum_of(name)


# Megatron-Core: our settings, its settings
GROUPS = {"num_expert_groups": 3, "top_k_groups": 2}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
MEGATRON = {
    "switch": ({"top_k": 1}, {"moe_router_pre_softmax": True}),
    "after": ({"top_k": 2, "softmax_order": "after"}, {}),
    "renormalised": ({"top_k": 3}, {}),  # its softmax after the choice is ours before it, renormalised
    "before": ({"top_k": 2, "renormalize": False}, {"moe_router_pre_softmax": True}),
    "scaled": (
        {"top_k": 2, "renormalize": False, "routed_scaling_factor": 2.5},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    ),
    "sigmoid": ({"top_k": 3, "score_function": "sigmoid"}, {"moe_router_score_function": "sigmoid"}),
    "sequence": (
        {"top_k": 2, "load_balancing": "seq_aux_loss"},
        {"moe_router_load_balancing_type": "seq_aux_loss"},
    ),
    # Of the choices made by a plan it takes the sigmoid of the logit at one expert a token, else the softmax over all.
    "sinkhorn": ({"load_balancing": "sinkhorn", "score_function": "sigmoid"}, SINKHORN),
    "sinkhorn_2": ({"load_balancing": "sinkhorn", "top_k": 2, "renormalize": False}, SINKHORN),
    "drops": (
        {"top_k": 2, "capacity_factor": 0.75, "drop_policy": "probability"},
        {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "probs"},
    ),
    "shared": (
        {"top_k": 2, "num_shared_experts": 2, "shared_expert_gate": True},
        {"moe_shared_expert_intermediate_size": 2 * FFN, "moe_shared_expert_gate": True},
    ),
    # It adds up top_k / top_k_groups = 2 scores of a group, as we and DeepSeek-V3 always do. Both balance the top_k of
    # the scores without groups.
    "groups": (
        {"top_k": 4, "score_function": "sigmoid", **GROUPS},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": 3,
            "moe_router_group_topk": 2,
        },
    ),
}


def megatron_layer(layer: MoELayer, settings: dict[str, Any]) -> nn.Module:
    """Megatron-Core's layer with our layer's weights."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    kept = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": layer.moe.aux_loss_coeff}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=layer.moe.top_k,
        moe_z_loss_coeff=layer.moe.z_loss_coeff,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather",
        activation_func=nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        **(kept | settings),
    )
    theirs = moe_layer(config).to(layer.router.weight.device)
    theirs.set_layer_number(1)  # without it losses are not noted down
    with torch.no_grad():
        theirs.router.weight.copy_(layer.router.weight)
        for expert, into, down in zip(
            theirs.experts.local_experts, *as_linear(layer.experts.w_in, layer.experts.w_out), strict=True
        ):
            expert.linear_fc1.weight.copy_(into)
            expert.linear_fc2.weight.copy_(down)
        for weight, ours in zip(megatron_shared(theirs), megatron_order(shared_weights(layer)), strict=True):
            weight.copy_(ours)
    return theirs


def megatron_shared(theirs: nn.Module) -> list[nn.Parameter]:
    shared = theirs.shared_experts
    return [] if shared is None else [shared.linear_fc1.weight, shared.linear_fc2.weight, shared.gate_weight]


def megatron_order(ours: list[nn.Parameter]) -> list[Tensor]:
    """It keeps gate and up after one another."""
    return [torch.cat(list(ours[:2])), *ours[2:]] if ours else []


def megatron_pass(theirs: nn.Module, runtime: Runtime) -> Passed:
    x_SBD, above_SBD = inputs(runtime)
    out_SBD, _ = theirs(x_SBD)
    out_SBD.backward(above_SBD)
    experts = theirs.experts.local_experts
    gradients = [
        # None: no token came by
        torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
        for weights in ([e.linear_fc1.weight for e in experts], [e.linear_fc2.weight for e in experts])
    ]
    shared = flat([w.grad for w in megatron_shared(theirs)])
    return Passed(out_SBD, x_SBD.grad, theirs.router.weight.grad, *gradients, shared)


@pytest.mark.filterwarnings("ignore")  # of Megatron-Core, about its own future
@pytest.mark.parametrize("name", MEGATRON)
def test_equals_megatron_core(name: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import moe_utils

    scale = torch.tensor(LOSS_SCALE, device=runtime.device)
    monkeypatch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    moe_utils.clear_aux_losses_tracker()  # 0.19 gives out a copy, and 0.16 sets to zero what it keeps
    moe_utils.get_moe_layer_wise_logging_tracker().clear()

    settings, their_settings = MEGATRON[name]
    layer = sparse(
        MoeConfig(
            **{"num_experts": EXPERTS, "capacity_factor": None, "aux_loss_coeff": 0.5, "z_loss_coeff": 0.2} | settings
        ),
        runtime,
    )
    theirs = megatron_layer(layer, their_settings)
    got, wanted = pass_through(layer, runtime), megatron_pass(theirs, runtime)
    got.assert_equals(wanted)
    losses = {key: value["values"].item() for key, value in moe_utils.get_moe_layer_wise_logging_tracker().items()}
    assert logged(layer, "z_loss") == pytest.approx(losses.pop("z_loss"), rel=1e-5)
    for balancing in losses.values():
        assert logged(layer, "aux_loss") == pytest.approx(balancing, rel=1e-5)
    assert len(losses) == (0 if "moe_aux_loss_coeff" in their_settings else 1)
    assert (logged(layer, "dropped_fraction") > 0) == (name == "drops")


# Hugging Face Transformers: the model's package and class prefix, our settings, its settings
TRANSFORMERS = {
    "mixtral": ("Mixtral", {"top_k": 2, "softmax_order": "after"}, {"num_local_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {"top_k": 4}, {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"top_k": 4, "renormalize": False}, {"num_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"top_k": 4, "renormalize": False, "num_shared_experts": 2, "shared_expert_gate": True},
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": 2 * FFN},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "top_k": 3,
            "num_shared_experts": 2,
            "renormalize": False,
            "routed_scaling_factor": 16.0,
            "group_score": "max",
            **GROUPS,
        },
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "num_attention_heads": 4,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "top_k": 3,
            "num_shared_experts": 2,
            "score_function": "sigmoid",
            "routed_scaling_factor": 2.5,
            "bias_update_rate": 0.001,
            **GROUPS,
        },
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
}


def transformers_block(name: str, prefix: str, layer: MoELayer, settings: dict[str, Any]) -> nn.Module:
    """The sparse block of a model in Hugging Face Transformers with our layer's weights."""
    modelling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(importlib.import_module(f"transformers.models.{name}"), f"{prefix}Config")(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        moe_intermediate_size=FFN,
        num_experts_per_tok=layer.moe.top_k,
        hidden_act="silu",
        **settings,
    )
    kind = {"deepseek_v3": "MoE", "deepseek_v2": "Moe"}.get(name, "SparseMoeBlock")
    block = getattr(modelling, prefix + kind)(config).to(layer.router.weight.device)
    into, down = as_linear(layer.experts.w_in, layer.experts.w_out)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(into)
        block.experts.down_proj.copy_(down)
        for theirs, ours in zip(transformers_shared(block), shared_weights(layer), strict=True):
            theirs.copy_(ours)
    return block


def transformers_shared(block: nn.Module) -> list[nn.Parameter]:
    shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    if shared is None:
        return []
    gate = [block.shared_expert_gate.weight] if hasattr(block, "shared_expert_gate") else []
    return [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight, *gate]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_transformers(name: str, runtime: Runtime) -> None:
    prefix, settings, their_settings = TRANSFORMERS[name]
    layer = sparse(
        MoeConfig(
            **{"num_experts": EXPERTS, "capacity_factor": None, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0} | settings
        ),
        runtime,
    )
    block = transformers_block(name, prefix, layer, their_settings)
    if layer.router.bias is not None:
        layer.router.bias.copy_(0.3 * random(EXPERTS))
        block.gate.e_score_correction_bias.copy_(layer.router.bias)
    x_SBD, above_SBD = inputs(runtime)
    out_SBD = block(x_SBD.transpose(0, 1).contiguous()).transpose(0, 1)
    out_SBD.backward(above_SBD)
    experts = (block.experts.gate_up_proj.grad, block.experts.down_proj.grad)
    shared = flat([w.grad for w in transformers_shared(block)])
    pass_through(layer, runtime).assert_equals(Passed(out_SBD, x_SBD.grad, block.gate.weight.grad, *experts, shared))


def test_bias_moves_as_in_megatron_core(runtime: Runtime) -> None:
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    router = sparse(MoeConfig(num_experts=EXPERTS, top_k=2, bias_update_rate=0.001), runtime).router
    assert router.bias is not None
    theirs = router.bias.detach().clone()
    for step in range(3):
        load_E = torch.randint(5, (EXPERTS,), generator=torch.Generator().manual_seed(step)).to(runtime.device)
        theirs = get_updated_expert_bias(load_E.float(), theirs, 0.001)
        router.end_step(load_E.double())
    assert_close(router.bias, theirs.cpu().double())


def test_balancing_loss_is_that_of_transformers_but_for_its_factor_k(runtime: Runtime) -> None:
    """Transformers counts the choices of a token K times; ours is 1 when uniform, whatever K."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer = sparse(MoeConfig(num_experts=EXPERTS, top_k=3), runtime)
    x_SBD, _ = inputs(runtime)
    run_layer(layer, x_SBD)
    logits_TE = router_logits(x_SBD.flatten(0, 1), layer.router.weight)
    theirs = load_balancing_loss_func((logits_TE,), EXPERTS, 3)
    assert logged(layer, "aux_loss") == pytest.approx(theirs.item() / 3, rel=1e-5)
    # It pools layers, where we add them up: so a coefficient is multiplied by K / L.
    pooled = load_balancing_loss_func((logits_TE,) * 5, EXPERTS, 3)
    assert 5 * logged(layer, "aux_loss") * 3 / 5 == pytest.approx(pooled.item(), rel=1e-5)
