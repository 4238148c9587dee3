"""Other packages are changed, and called by private names, in the modules that are there for it and nowhere else."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
# Where something foreign is changed, or called although its name is private, and why it is not in one of the modules
# that are there for it.
PLACES = (
    *("parallel/megatron_compat.py", "parallel/megatron_groups.py"),
    *("parallel/torch_private.py", "conf/hydra_private.py"),
)
META_STEP = (
    *("layers", "torch", "torch.Tensor", "torch.utils._python_dispatch"),
    *("torch.utils._python_dispatch._disable_current_modes", "torch.ops.aten._scaled_dot_product_flash_attention"),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
)
ALLOWED = {
    ("training/builder.py", "torch.utils.deterministic.fill_uninitialized_memory"): "a documented setting",
    ("parallel/engine.py", "torch._foreach_mul_"): "documented, in spite of its name",
    ("parallel/chunked_ops.py", "torch._foreach_norm"): "documented, in spite of its name",
    (
        "parallel/activation_checkpoint.py",
        "torch.ops.aten._grouped_mm",
    ): "an operator's own name, for selective recompute",
    (
        "parallel/optimizers.py",
        "torch._fused_adamw_",
    ): "what torch's fused AdamW calls, of which there is no other way",
    ("benchmarks/scale_rank.py", "dist.new_group"): "counts the groups that Megatron-Core makes",
    ("benchmarks/mirror_world.py", "dist.Store"): "counts requests; no part of a run",
    ("benchmarks/optimizer_states.py", "ddp._ParamAndGradBuffer"): "a control, wrong on purpose",
    ("benchmarks/measurement.py", "torch.utils._python_dispatch.TorchDispatchMode"): "counts bytes; no part of a run",
    ("benchmarks/measurement.py", "torch.utils._pytree.tree_leaves"): "counts bytes; no part of a run",
    ("training/eval_tasks.py", "tqdm.__init__"): "no bars are drawn within a context; TQDM_DISABLE is read at import",
    ("benchmarks/train_step.py", "MixtralForCausalLM._from_config"): "another project's, which is timed",
    **{
        ("training/live_storages.py", name): "counts bytes; no part of a run"
        for name in ("torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._pytree.tree_leaves")
    },
    **{
        ("training/meta_step.py", name): "a step on meta tensors, which have no device; undone after it"
        for name in META_STEP
    },
}


def foreign_uses(text: str) -> set[str]:
    """What a file changes in packages that are not ours, and what it takes from them by a private name."""

    def foreign(module: str) -> bool:
        return module.split(".")[0] not in OWN | sys.stdlib_module_names

    def is_private(name: str) -> bool:
        return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))

    nodes, imported, found = list(ast.walk(ast.parse(text))), set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).split(".")[0] for a in node.names if foreign(a.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and foreign(node.module):
            imported |= {a.asname or a.name for a in node.names}
            found |= {name for a in node.names if is_private(name := f"{node.module}.{a.name}")}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            changed = not isinstance(node.ctx, ast.Load)
            is_path = re.fullmatch(r"[\w.]+", name) and name.split(".")[0] in imported
            if is_path and (changed or is_private(node.attr)):
                found.add(name)
        elif isinstance(node, ast.Call) and node.args:
            function, first = ast.unparse(node.func), ast.unparse(node.args[0]).strip("'\"")
            patches = function in ("setattr", "delattr") or function.split(".")[-1] in ("patch", "object")
            top = first.split(".")[0]
            if patches and (top in imported or (isinstance(node.args[0], ast.Constant) and foreign(top))):
                found.add(first)
    return found


def test_nothing_foreign_is_changed_elsewhere():
    files = {str(p.relative_to(ROOT)): p for name in OWN - {"tests"} for p in (ROOT / name).rglob("*.py")}
    found = {
        (name, use) for name, path in files.items() if name not in PLACES for use in foreign_uses(path.read_text())
    }
    assert found == ALLOWED.keys(), found ^ ALLOWED.keys()


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("import torch; torch.compile = None", "torch.compile"),
        ("from megatron.core import optimizer; optimizer.Adam = None", "optimizer.Adam"),
        ("import torch; setattr(torch.cuda, 'Stream', None)", "torch.cuda"),
        ("from unittest import mock; mock.patch('torch.cuda.Stream')", "torch.cuda.Stream"),
        ("from hydra._internal.utils import get_args_parser", "hydra._internal.utils.get_args_parser"),
        ("import torch.distributed as dist; dist.distributed_c10d._world", "dist.distributed_c10d._world"),
        ("import torch; torch.zeros(1).data = None; self._x = 1; os.environ['a'] = 'b'", None),
    ],
)
def test_a_change_is_noticed(line, use):
    assert foreign_uses(line) == ({use} if use else set())
