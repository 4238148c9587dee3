"""What TransformerEngine and Apex compute on this GPU, beside the references: for tests/gpu/test_te.py and the stage of
that name."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from conf.schema import Config, Fp8Config, ModelConfig, MoeConfig, OptimConfig
from models.operations import OPERATIONS
from ops import te
from ops.linear import LINEAR
from ops.norm_linear import NORM_LINEAR
from ops.operation import Implementation, Operation
from ops.registry import examine
from ops.run_context import RunContext
from ops.te_fp8 import TE_FP8
from parallel.process_groups import Runtime

PACKAGES = ("transformer_engine.pytorch", "apex", "fused_weight_gradient_mlp_cuda")
NAMES = (te.NAME, "te", "Apex", "TransformerEngine FusedAdam", "Apex FusedAdam")
"""Of implementations that call them."""
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=512,
    moe=MoeConfig(num_experts=8, top_k=2),
)

LATENT = replace(
    MODEL,
    num_query_groups=None,
    kv_lora_rank=128,
    q_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    mtp_num_layers=1,
    tie_embeddings=True,
)
"""With every kind of linear layer."""


def missing(package: str) -> str | None:
    """Why a package cannot be imported; None: it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a half-installed package raises more than ImportError
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return None


def implementations() -> Iterator[tuple[str, Operation[Any], Implementation[Any]]]:
    """(name, operation, implementation) of all that call one of the packages, FP8 left out."""
    for operation in OPERATIONS:
        for implementation in operation.implementations:
            if implementation.name in NAMES and operation is not TE_FP8:
                yield f"{operation.name}: {implementation.name}", operation, implementation


def verified(operation: Operation[Any], implementation: Implementation[Any], runtime: Runtime) -> tuple[bool, str]:
    """(whether an implementation passes its trial here, how close it comes or why it does not)."""
    alone, why = replace(operation, implementations=[implementation], tune=None), ""
    for model in (MODEL, LATENT) if operation in (LINEAR, NORM_LINEAR) else (MODEL,):
        findings = examine(alone, RunContext(Config(model=model, optim=OptimConfig()), runtime, torch.bfloat16))
        if implementation.name not in findings.verified:
            return False, "; ".join([*findings.notes, *(f"not installed: {name}" for name in findings.absent)])
        why = findings.verified[implementation.name][2]
    return True, why


def recipe_verified(recipe: str, runtime: Runtime) -> tuple[bool, str]:
    """The same of fp8.kernels=te with a recipe."""
    config = Config(model=MODEL, precision="fp8", fp8=Fp8Config(kernels="te", recipe=recipe))
    try:
        findings = examine(TE_FP8, RunContext(config, runtime, torch.bfloat16))
    except ValueError as error:
        return False, str(error)
    return True, findings.verified["te"][2]
