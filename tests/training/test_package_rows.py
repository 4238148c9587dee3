"""launch.check names what the operations of a run could use of TransformerEngine and Apex."""

from typing import Any

import pytest
import torch

from conf.schema import ClusterConfig, Config, Fp8Config, MoeConfig, OptimConfig
from models.operations import OPERATIONS
from ops import te
from parallel.process_groups import Runtime
from tests.moe.helpers import run_context, tiny
from training.package_rows import APEX, TE, package_rows

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
