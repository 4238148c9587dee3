"""launch.check names what the operations of a run could use of TransformerEngine and Apex."""

from typing import Any

import pytest
import torch

from conf.schema import ClusterConfig, Config, Fp8Config, ModelConfig, MoeConfig, OptimConfig, ParallelConfig
from models.operations import OPERATIONS
from ops import te
from parallel.layout import Layout
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, tiny
from training.kept_activations import Activations
from training.package_rows import APEX, TE, package_rows
from training.planner.rates import rates_of
from training.planner.report import basis

FIELDS = {"weight gradients": "fuse_weight_gradient", "optimizer": "adamw", "norm": "rms_norm"}
FIELDS |= {"router": "route", "permutation": "permutation", "experts": "experts"}
RUNS = {
    "plain": {},
    "dense": {"model": {"num_experts": 0}},
    "local": {"model": {"transformer_impl": "local"}},
    "layer norm": {"model": {"norm": "layernorm"}},
    "moments in bf16": {"optim": OptimConfig(state_dtype="bf16")},
    "muon": {"optim": OptimConfig(name="muon")},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_the_rows_are_what_the_operations_could_use(runtime: Runtime, settings: dict[str, Any]) -> None:
    model, further = dict(settings.get("model", {})), {k: v for k, v in settings.items() if k != "model"}
    moe = MoeConfig(num_experts=model.pop("num_experts", 4))
    context = run_context(
        tiny(moe, **model), runtime, torch.bfloat16, torch.device("cuda"), precision="bf16",
        cluster=ClusterConfig(gpus=True), **further,
    )  # fmt: skip
    rows = {name: (parts.split(", "), why) for name, parts, why in package_rows(context.config, bf16=True)}
    by_field = {operation.field: operation for operation in OPERATIONS}
    for package, row in ((te.NAME, f"{TE}, candidate"), ("Apex", APEX)):
        wanted = set()
        for part, field in FIELDS.items():
            operation = by_field[field]
            mine = [i for i in operation.implementations if package in i.name or (package, i.name) == (te.NAME, "te")]
            if operation.is_used(context) and any(i.is_supported(context) for i in mine):
                wanted.add(part)
        parts, why = rows.get(row, ([], ""))
        assert set(parts) == wanted
        assert all(f"{part}: " in why or f"{part}, " in why for part in parts)


def test_cpus_have_no_rows_and_fp8_says_what_it_needs() -> None:
    assert package_rows(Config(), bf16=False) == []
    fp8 = Config(precision="fp8", fp8=Fp8Config(kernels="te", recipe="mxfp8"))
    name, parts, why = package_rows(fp8, bf16=True)[0]
    assert name == TE and parts.startswith("FP8 products (mxfp8)") and "has to be installed" in why
    on_gpus = Config(precision="fp32", cluster=ClusterConfig(gpus=True))
    assert package_rows(on_gpus, bf16=False)[0][1:] == (
        "nothing", "its layers compute in bf16, and precision is fp32 (model.transformer_impl=auto)"
    )  # fmt: skip


def test_a_plan_says_what_it_assumes_of_the_package() -> None:
    run = Config(precision="fp8", fp8=Fp8Config(kernels="te", recipe="mxfp8"))
    shown = basis(run, rates_of("h100"), 1.2)
    assert "TransformerEngine's FP8 products (mxfp8), never measured here" in shown and "two copies in FP8" in shown
    run = Config(model=ModelConfig(transformer_impl="transformer_engine"))
    assert "TransformerEngine's layers, never measured here" in basis(run, rates_of("h100"), 1.2)
    run = Config(parallel=ParallelConfig(cp=2, cp_comm_type="p2p"))
    assert "cp_comm_type=p2p takes as long as gathering" in basis(run, rates_of("h100"), 1.2)
    assert "assumed" not in basis(Config(), rates_of("h100"), 1.2)


def test_experts_of_the_package_keep_gathered_rows_and_separate_products() -> None:
    """In the memory estimate: of a SwiGLU gate, up, the activated gate and the product, where our kernels keep gate and
    up; and rows, which our kernels read from where the tokens lie."""
    model = ModelConfig(activation="swiglu", moe=MoeConfig(num_experts=8, top_k=2))
    own, te_s = (
        Activations(Config(model=model, precision="fp8", fp8=Fp8Config(kernels=kernels)), Layout(1), True, True)
        for kernels in ("auto", "te")
    )
    further = own.rows * 2 * (model.hidden_size + 2 * model.expert_width)
    assert te_s.layer(sparse=True) - own.layer(sparse=True) == further
