"""The changes to Megatron-Core come and go without a trace, each is still needed, and there are no others. Patches are
tried in a rank process, which nobody else looks at."""

import importlib.util
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ParallelConfig
from parallel import megatron_compat as compat
from parallel.env import World
from parallel.local_launcher import RankPool
from parallel.process_groups import Runtime
from tests.parallel.helpers import Variant, build_engine, started, train

MISSING = object()
ROOT = Path(__file__).resolve().parents[2]


def snapshot() -> dict[tuple[str, str], Any]:
    """Every attribute of the places that are patched."""
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random

    owners = {"torch": torch, "torch.cuda": torch.cuda, "random": random, "buffers": buffers, "Tensor": torch.Tensor}
    # Tensor inherits what is patched on it, so its own dictionary is not enough.
    return {(key, n): inspect.getattr_static(owner, n, MISSING) for key, owner in owners.items() for n in dir(owner)}


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    return {key for key in before.keys() | after.keys() if before.get(key, MISSING) is not after.get(key, MISSING)}


def install_and_undo(world: World) -> dict[str, Any]:
    compat.undo()  # an earlier test of this rank may have installed them
    original = snapshot()
    installed, patched = compat.install(), snapshot()
    compat.install()
    patched_again = snapshot()
    told = {
        "installed": installed,
        "patched": changed(original, patched),
        "patched again": changed(patched, patched_again),
        "a tensor on 'cuda'": torch.zeros(1, device="cuda").device.type,
        "a tensor elsewhere": torch.zeros(1, device="meta").device.type,
    }
    compat.undo()
    told["left behind"] = changed(original, snapshot())
    compat.undo()
    told["left behind by a second undo"] = changed(original, snapshot())
    return told


def test_undo_restores_every_attribute(ranks):
    (told,) = ranks.run(1, install_and_undo, timeout=30)
    assert told["installed"] and told["patched again"] == set()
    # A few that a reader expects, and of each owner one.
    assert told["patched"] >= {
        ("torch", "zeros"),
        ("torch.cuda", "current_device"),
        ("random", "_get_cuda_rng_state"),
        ("buffers", "dist_reduce_scatter_func"),
    }
    assert told["left behind"] == told["left behind by a second undo"] == set()
    assert (told["a tensor on 'cuda'"], told["a tensor elsewhere"]) == ("cpu", "meta")


def install_with_cuda(world: World) -> tuple[bool, set[tuple[str, str]], str]:
    compat.undo()
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        before = snapshot()
        installed = compat.install()
        with compat.cuda_type_names():
            name = torch.zeros(1).type()
        return installed, changed(before, snapshot()), name
    finally:
        torch.cuda.is_available = available


def test_with_cuda_nothing_is_patched(ranks):
    assert ranks.run(1, install_with_cuda, timeout=30) == [(False, set(), "torch.FloatTensor")]


def type_names(world: World) -> list[str]:
    one = torch.ones(1, dtype=torch.bfloat16)
    original = inspect.getattr_static(torch.Tensor, "type")
    told = [one.type()]
    try:
        with compat.cuda_type_names():
            told += [one.type(), str(one.type(torch.float64).dtype)]
            raise InterruptedError
    except InterruptedError:
        pass
    assert inspect.getattr_static(torch.Tensor, "type") is original
    return [*told, one.type()]


def test_type_names_change_only_while_an_optimizer_is_built(ranks):
    wanted = ["torch.BFloat16Tensor", "torch.cuda.BFloat16Tensor", "torch.float64", "torch.BFloat16Tensor"]
    assert ranks.run(1, type_names, timeout=30) == [wanted]


def test_the_engine_is_imported_without_torchs_compiler():
    """Half of the import's time, and of every command's way to its first step."""
    script = (
        "import torch; c = torch.compile; from parallel import megatron_compat; megatron_compat.load(); import sys; "
    )
    script += "print('torch._dynamo' in sys.modules, 'megatron.core' in sys.modules, torch.compile is c)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True", "True"]


def test_nothing_before_the_fork_initialises_the_driver():
    """What the fork servers of runs and tests preload, with a torch that was built with CUDA and a driver that notices
    every call. A rank that is forked from a process whose driver is initialised fails at its first CUDA call."""
    script = """
import sys, torch
from torch import cuda
called = []
torch._C._cuda_getDeviceCount = lambda: called.append("cudaGetDeviceCount") or 1
for name in ("_cuda_init", "_cuda_getDevice", "_cuda_setDevice"):
    setattr(torch._C, name, lambda *a, name=name: called.append(name))
cuda._is_compiled = lambda: True
cuda._lazy_init = lambda: called.append("_lazy_init")
cuda._device_count_nvml = lambda: -1  # a container without the management library: no way round the driver
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
assert "megatron.core" in sys.modules
print(called)
assert torch.cuda.is_available() and called  # the stand-in works
"""
    from parallel.local_launcher import RankPool
    from training import worker

    default = inspect.signature(RankPool.__init__).parameters["preload"].default
    command = [sys.executable, "-W", "ignore", "-c", script, *default, *worker.PRELOAD]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]"]


def steps_without(world: World) -> dict[str, Any]:
    """What two steps give without each of the CPU patches, by its attribute."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from parallel.process_groups import seed_all

    def outcome() -> Any:
        try:
            seed_all(1)
            told = train(build_engine(runtime, Variant({"num_layers": 1})), range(2))
            with get_cuda_rng_tracker().fork():
                drawn = torch.rand(()).item()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return told, drawn, torch.rand(()).item()

    single = {f"{p.owner}.{name}": replace(p, names=(name,)) for p in compat.CPU_PATCHES for name in p.names}
    outcomes = {}
    with started(world, ParallelConfig()) as runtime:
        for left_out in ("none", *single):
            compat.undo()
            compat.install([patch for key, patch in single.items() if key != left_out])
            outcomes[left_out] = outcome()
        compat.undo()
        compat.install()
    return outcomes


def test_every_cpu_patch_is_still_needed(ranks: RankPool) -> None:
    """Where this fails, Megatron-Core no longer asks for CUDA there: delete the patch from CPU_PATCHES."""
    (outcomes,) = ranks.run(1, steps_without, timeout=120)
    right = outcomes.pop("none")
    assert isinstance(right, tuple), right
    fast = {key for key in outcomes if key.startswith("megatron.core.distributed.")}  # they have a test of their own
    newer = set() if compat.is_since(0, 19) else {"torch.cuda.current_stream"}
    assert {key for key, outcome in outcomes.items() if outcome == right} == fast | newer


def sent_to_itself(world: World) -> set[str]:
    """What Megatron-Core sends in a step of a single rank, to itself."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    told = set()
    with started(world, ParallelConfig()) as runtime:
        for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
            original = getattr(buffers, name)

            def record(output, given, *args, name=name, original=original, group, **kwargs):
                if group.size() == 1 and output.data_ptr() == given.data_ptr():
                    told.add(name)
                return original(output, given, *args, group=group, **kwargs)

            setattr(buffers, name, record)
        try:
            train(build_engine(runtime, Variant()), range(1))
        finally:
            compat.undo()
            compat.install()
    return told


def test_a_rank_alone_still_sends_to_itself(ranks: RankPool) -> None:
    (told,) = ranks.run(1, sent_to_itself, timeout=60)
    assert told == {"dist_reduce_scatter_func", "dist_all_gather_func"}


def without_type_names(world: World) -> str:
    named, compat._cuda_name = compat._cuda_name, lambda type_of: type_of
    try:
        with started(world, ParallelConfig()) as runtime:
            build_engine(runtime, Variant())
    except TypeError as error:
        return str(error)
    finally:
        compat._cuda_name = named
    return "built"


def test_the_optimizer_still_goes_by_the_names_of_types(ranks: RankPool) -> None:
    assert "torch.FloatTensor" in ranks.run(1, without_type_names, timeout=60)[0]


def test_the_optimizer_takes_no_class(runtime: Runtime) -> None:
    """With another parameter than these, look whether `set_optimizer_class` can go."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    known = {"config", "model_chunks", "config_overrides", "use_gloo_process_groups", "pg_collection"}
    known |= {"dump_param_to_param_group_map"}
    assert set(inspect.signature(get_megatron_optimizer).parameters) == known
    assert hasattr(DistributedOptimizer, "_copy_main_params_to_model_params")  # what replace_inner_optimizer turns off
    # Nor has it a public name for what optimizer_range gives.
    assert not any("range" in name for name in vars(DistributedOptimizer) if not name.startswith("_"))


class FusedAdam(torch.optim.Optimizer):
    """As of TransformerEngine: what Megatron-Core builds by itself where that is installed."""

    def __init__(self, params: Any, adam_w_mode: bool, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        raise AssertionError("must not be used")


def test_the_class_of_the_optimizer_is_the_one_asked_for(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Megatron-Core builds another one, and to the bit; parameters in fp32 and in bf16."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    for dtype in (torch.float32, torch.bfloat16):
        variant = Variant(dtype=dtype)
        wanted = train(build_engine(runtime, variant), range(3))
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "Adam", FusedAdam)
            patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
            patch.setattr(distrib_optimizer, "Adam", FusedAdam)
            engine = build_engine(runtime, variant)
        assert engine.optimizer is not None
        inner = [part.optimizer for part in engine.optimizer.chained_optimizers]
        assert [type(one) for one in inner] == [torch.optim.AdamW] * len(inner)
        assert train(engine, range(3)) == wanted


def gemm_is_missing(world: World) -> tuple[bool, bool]:
    from megatron.core.transformer.moe import moe_utils

    missing = not hasattr(moe_utils, "te_general_gemm")
    compat.name_missing_gemm()
    return missing, moe_utils.te_general_gemm is None


def test_only_the_older_version_lacks_a_name(ranks: RankPool) -> None:
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("transformer_engine is installed here")
    assert ranks.run(1, gemm_is_missing, timeout=60) == [(not compat.is_since(0, 19), True)]


def test_layers_ask_for_the_current_device(runtime: Runtime) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    engine = build_engine(runtime, Variant({"num_layers": 1}))
    meta = torch.device("meta")
    with compat.layers_made_on(meta):
        layer = ColumnParallelLinear(4, 4, config=engine.config, init_method=lambda w: w, bias=False)
    assert layer.weight.device == meta and torch.cuda.current_device() == compat.CPU


def test_linear_layers_call_the_product_that_they_are_given(runtime: Runtime) -> None:
    engine = build_engine(runtime, Variant({"num_layers": 1}))
    calls = []

    def product(x_SBK: Tensor, w_NK: Tensor, *how: Any) -> Tensor:
        calls.append(how)
        return x_SBK @ w_NK.t()

    compat.replace_linear_product(engine.modules[0], product)
    train(engine, range(1))
    assert calls and all(gather is reduce is False for gather, reduce, _ in calls)


def test_what_the_import_is_kept_from():
    """Without the patches of the import: torch's compiler is loaded, and 0.19 asks for a device."""
    script = """
import sys
import torch
from parallel import megatron_compat
asked, available = [], torch.cuda.is_available
torch.cuda.is_available = lambda: asked.append(sys._getframe(1).f_globals["__name__"]) or available()
compat_patches, megatron_compat.IMPORT_PATCHES = megatron_compat.IMPORT_PATCHES, ()
megatron_compat.import_core()
print("torch._dynamo" in sys.modules, any(name.startswith("megatron.") for name in asked))
print(megatron_compat.is_since(0, 19))
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    compiler, device, newer = (word == "True" for word in done.stdout.split())
    assert compiler and device == newer


BESIDE = """
import sys
from parallel import megatron_compat
megatron_compat.load()
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.tensor_parallel import layers, random
print(utils.tex, random.HAVE_TE or layers.HAVE_TE, megatron_compat.has_weight_gradient_kernel())
print(*{name.partition(".")[0] for name in sys.modules} & {"transformer_engine", "apex", "amp_C"})
import transformer_engine
"""
PACKAGES = {
    "broken": 'raise OSError("libcudart.so.99: cannot open shared object file")',
    "of another version": "kernels = 1",
}


@pytest.mark.parametrize("text", PACKAGES.values(), ids=PACKAGES)
def test_megatron_imports_beside_any_transformer_engine_and_apex(tmp_path: Path, text: str) -> None:
    """And finds neither, but for the extension that adds up weight gradients. The run itself can import them after."""
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda"):
        (tmp_path / f"{name}.py").write_text(text)
    command, where = [sys.executable, "-W", "ignore", "-c", BESIDE], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"None False {text == 'kernels = 1'}", ""], done.stderr
    assert "OSError: libcudart" in done.stderr if "OSError" in text else done.returncode == 0


STEPS = """
import sys
import torch
from parallel import megatron_compat, torch_private
torch_private.set_deterministic(sys.argv[1] == "deterministic")
if sys.argv[2] == "kept":
    megatron_compat.keep_from_compiler()
w = torch.ones(3, requires_grad=True)
optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
for _ in range(2):
    optimizer.zero_grad()
    (w * torch.arange(3.0)).square().sum().backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, torch.are_deterministic_algorithms_enabled(), w.tolist())
megatron_compat.undo()
print(optimizer.step() is None, "torch._dynamo" in sys.modules)
"""


def test_optimizers_step_without_torchs_compiler():
    """And compute the same. Where the last line fails, torch no longer loads it: delete COMPILER_PATCHES."""

    def run(*words: str) -> list[str]:
        command = [sys.executable, "-W", "ignore", "-c", STEPS, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    plain, kept = run("deterministic", "loaded"), run("deterministic", "kept")
    weights = plain[0].split(maxsplit=2)[2]
    assert kept == [f"False True {weights}", "True True"]
    assert plain == [f"True True {weights}", "True True"]
