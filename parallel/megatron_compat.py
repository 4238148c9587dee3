"""Every change to Megatron-Core, or made for it, and every use of what it keeps private: nothing is patched elsewhere,
and a test looks. Tested with 0.16.1 and 0.19.2.

- Without CUDA, Megatron-Core runs on CPU tensors and gloo, so that tests, laptops and CI execute the code that clusters
  execute. It names CUDA directly in hundreds of places; CPU_PATCHES covers those that training meets. They are
  installed only where CUDA is absent, and `undo` takes every one of them back.
- What Megatron-Core has no argument for is patched for the length of a `with` block.
- Where versions differ, a function of this file hides the difference.

Each change has a test that fails once Megatron-Core no longer needs it.
"""

import contextlib
import functools
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


def _returning(value: Any) -> Callable[..., Any]:
    """A function that ignores its arguments; a new one for each name, since torch's compiler insists that no two of
    torch's names are the same function."""
    return lambda *args, **kwargs: value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same factory with device="cuda" read as the CPU. A wrapper per factory costs far less than a
    TorchFunctionMode, which sits in the way of every torch call."""

    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return factory(*args, **kwargs)
        if device == "cuda" or getattr(device, "type", None) == "cuda":
            device = CPU
        return factory(*args, device=device, **kwargs)

    return make


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves out a collective in place over a single rank. NCCL does that by itself; gloo copies the whole bucket to
    another place and back."""

    @functools.wraps(collective)
    def call(output: Tensor, given: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, *args, group=group, **kwargs)

    return call


Saved = list[tuple[Any, str, Any]]
"""(owner, name, original)"""


@dataclass(frozen=True)
class Patch:
    """Attributes of a module or class that are replaced."""

    owner: str
    names: tuple[str, ...]
    replace: Callable[[Any], Any]
    """original -> replacement, called for each name."""
    why: str

    def apply(self) -> Saved:
        """Returns (owner, name, original) of what was replaced."""
        owner = pkgutil.resolve_name(self.owner)
        saved = [(owner, name, getattr(owner, name)) for name in self.names]
        for _, name, original in saved:
            setattr(owner, name, self.replace(original))
        return saved


def _restore(saved: Saved) -> None:
    for owner, name, original in reversed(saved):
        setattr(owner, name, original)


_RANDOM = "megatron.core.tensor_parallel.random"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
CPU_PATCHES = (
    Patch("torch.cuda", ("current_device",), lambda _: _returning(CPU), "Buffers and scalars are made there."),
    Patch("torch.cuda", ("current_stream",), lambda _: _returning(None), "0.19 asks before it reduces gradients."),
    Patch("torch", ("tensor", "zeros"), _on_cpu, 'Literal device="cuda" in the optimizer and the schedules.'),
    Patch(
        "torch.cuda",
        ("get_rng_state",),
        lambda _: lambda *a, **k: torch.get_rng_state(),
        "The tensor-parallel random tracker keeps states of the CUDA generator.",
    ),
    Patch("torch.cuda", ("manual_seed",), lambda _: torch.manual_seed, "It makes each of them from a seed."),
    Patch(
        _RANDOM,
        ("_get_cuda_rng_state",),
        lambda _: lambda *a, **k: torch.get_rng_state(),
        "It reads and writes the generator by its index, past torch.cuda.",
    ),
    Patch(_RANDOM, ("_set_cuda_rng_state",), lambda _: lambda state, *a, **k: torch.set_rng_state(state), "The same."),
    Patch(
        _BUFFERS,
        ("dist_reduce_scatter_func", "dist_all_gather_func"),
        _unless_alone,
        "Speed: a rank that reduces with itself alone copies nothing.",
    ),
)


@contextlib.contextmanager
def _patched(*patches: Patch) -> Iterator[None]:
    saved: Saved = []
    try:
        for patch in patches:
            saved += patch.apply()
        yield
    finally:
        _restore(saved)


_installed: Saved = []


def install(patches: Sequence[Patch] = CPU_PATCHES) -> bool:
    """Installs the patches where CUDA is absent, once. Returns whether any are installed."""
    if torch.cuda.is_available():
        return False
    if not _installed:
        # `with torch.device(...)` knows the factories by identity, from the first time on: it is to know the real ones.
        _device_constructors()
        for patch in patches:
            _installed.extend(patch.apply())
    return True


def undo() -> None:
    """Takes the patches back, if there are any."""
    _restore(_installed)
    _installed.clear()


def _no_compile(function: Any = None, **options: Any) -> Any:
    return function if function else lambda decorated: decorated


def _not_for_megatron(is_available: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: not sys._getframe(1).f_globals["__name__"].startswith("megatron.") and is_available()


IMPORT_PATCHES = (
    Patch(
        "torch",
        ("compile",),
        lambda _: _no_compile,
        "Megatron-Core decorates layers that we do not use, which alone would load torch's compiler: half of the "
        "import's time.",
    ),
    Patch(
        "torch.cuda",
        ("is_available",),
        _not_for_megatron,
        "0.19 asks at import (dist_checkpointing/strategies/torch.py) whether to look for TransformerEngine's FP8 "
        "tensors, which no checkpoint of ours holds; the answer may initialise the driver.",
    ),
)


def import_core() -> ModuleType:
    """Imports Megatron-Core, quickly, and what the CPU patches need of it. Touches no device, so that a process which
    has called it can still be forked: a CUDA driver that was initialised before a fork is unusable after it."""
    with _patched(*IMPORT_PATCHES):
        import megatron.core
        from megatron.core.distributed import param_and_grad_buffer  # noqa: F401
        from megatron.core.tensor_parallel import random  # noqa: F401
    return megatron.core


def load() -> ModuleType:
    """Imports Megatron-Core and installs the CPU patches where they are needed. Called before anything else imports
    the engine; late, it only costs time."""
    core = import_core()
    install()
    return core


def _cuda_name(type_of: Callable[..., Any]) -> Callable[..., Any]:
    def named_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.")
        return result

    return named_cuda


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Inside, and without CUDA, `tensor.type()` returns the name of the CUDA type. Entered while get_megatron_optimizer
    runs, which sorts parameters by strings such as 'torch.cuda.BFloat16Tensor'; not for longer, because other libraries
    call tensor.type() too."""
    patches = [] if torch.cuda.is_available() else [Patch("torch.Tensor", ("type",), _cuda_name, "Types by name.")]
    with _patched(*patches):
        yield


def set_optimizer_class(optimizer: Any, adam: type[torch.optim.Optimizer], **defaults: Any) -> None:
    """Makes a distributed optimizer step with an instance of `adam`.

    get_megatron_optimizer has no argument for the class. It builds the FusedAdam of TransformerEngine or Apex,
    whichever imports, or torch's AdamW; that instance is replaced here before it has any state.

    Args:
        defaults: lr, weight_decay, betas and eps.
    """
    if optimizer.is_stub_optimizer or type(optimizer.optimizer) is adam:
        return
    inner, groups = adam([{"params": []}], **defaults), optimizer.optimizer.param_groups
    for group in groups:
        for name, value in inner.defaults.items():
            group.setdefault(name, value)
    inner.param_groups = groups  # the constructor rejects fp32 shards, which are views of parameters
    optimizer.optimizer = inner


@contextlib.contextmanager
def layers_made_on(device: torch.device) -> Iterator[None]:
    """Megatron-Core's layers name the device that they are made on, torch.cuda.current_device(); inside, it is this."""
    with _patched(Patch("torch.cuda", ("current_device",), lambda _: _returning(device), "Shapes without memory.")):
        yield


def name_missing_gemm() -> None:
    """Lets Megatron-Core's own router run without TransformerEngine: 0.16.1 compares this name with None, but defines
    it only where TransformerEngine is installed. 0.19 defines it."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def moe_layer(config: Any) -> nn.Module:
    """Megatron-Core's own sparse layer, to compare ours with. Its specification is a ModuleSpec in 0.16 and a function
    in 0.19."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    name_missing_gemm()
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    build = spec if is_since(0, 19) else functools.partial(spec.module, submodules=spec.submodules)
    return build(config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def replace_linear_product(module: nn.Module, product: Callable[..., Tensor]) -> None:
    """Every tensor-parallel linear layer inside `module` computes with `product`, for which its class has no argument.

    Args:
        product: (x [S, B, K], w [N, K], whether to gather x over the group first, whether to add up its gradient over
            the group, the group) -> [S, B, N].
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def forward_impl(input: Tensor, weight: Tensor, bias: None, **options: Any) -> Tensor:
        assert bias is None
        return product(input, weight, options["sequence_parallel"], options["allreduce_dgrad"], options["tp_group"])

    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer._forward_impl = forward_impl


@functools.cache
def is_since(major: int, minor: int) -> bool:
    """Whether Megatron-Core is of this version or newer."""
    import megatron.core

    return tuple(int(n) for n in megatron.core.__version__.split(".")[:2]) >= (major, minor)


def parameters_in_norm(optimizer: Any) -> list[nn.Parameter]:
    """The shards of a distributed optimizer that count in the gradient norm on this rank: of parameters that several
    ranks hold, one rank's. Its own function is of another name in 0.19 and takes each shard's `grad` only."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate as is_counted
    from megatron.core.transformer.module import param_is_not_shared

    names = ("tp_group", "expert_tp_group") if is_since(0, 19) else ("tp_group",)
    groups = {name: getattr(optimizer, name, None) for name in names}  # an optimizer of no parameters has none
    return [p for p in optimizer.get_parameters() if param_is_not_shared(p) and is_counted(p, **groups)]


def replace_inner_optimizer(optimizer: Any, inner: torch.optim.Optimizer) -> None:
    """Gives a distributed optimizer another one to step with, which writes the model's weights itself: what it would
    copy there from its fp32 shards has no argument to turn it off."""
    optimizer.optimizer = inner
    optimizer._copy_main_params_to_model_params = lambda: None


def optimizer_range(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """(start, end) of the part of the flattened parameter that a distributed optimizer keeps on this rank. Private
    there, and not in any sharded state that it gives out."""
    found = optimizer._get_model_param_range_map(parameter)["param"]
    return found.start, found.end
