"""All patches of Megatron-Core, or for it, and all uses of its private names but those of its process groups
(parallel/megatron_groups.py). No other module patches anything, which a test checks. Tested with versions 0.16.1 and
0.19.2.

- Without CUDA, CPU_PATCHES make Megatron-Core run on CPU tensors and gloo, so that tests, laptops and CI execute the
  same code as clusters. Megatron-Core names CUDA directly in hundreds of places; the patches cover those that training
  reaches. They are installed only where CUDA is absent, and `undo` removes them.
- What has no argument in Megatron-Core is patched inside a `with` block.
- Functions hide the differences between versions.

Each patch has a test that fails once Megatron-Core no longer needs it.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._device import _device_constructors  # pyright: ignore[reportPrivateUsage]

from parallel.patching import Patch, Saved, absent, patched, restore

T = TypeVar("T")
CPU = torch.device("cpu")


def _returning(value: T) -> Callable[..., T]:
    """A new function that ignores its arguments. Each patched name gets its own, since torch.compile requires that no
    two names in torch are the same function."""
    return lambda *args, **kwargs: value


def _on_cpu(factory: Callable[..., T]) -> Callable[..., T]:
    """The factory with device="cuda" replaced by the CPU. A wrapper per factory costs far less than a
    TorchFunctionMode, which intercepts every torch call."""

    @functools.wraps(factory)
    def make(*args: object, device: object = None, **kwargs: object) -> T:
        if device is None:
            return factory(*args, **kwargs)
        if device == "cuda" or getattr(device, "type", None) == "cuda":
            device = CPU
        return factory(*args, device=device, **kwargs)

    return make


def _unless_alone(collective: Callable[..., T]) -> Callable[..., T | None]:
    """Skips an in-place collective over a single rank, as NCCL does; gloo would copy the whole bucket twice."""

    @functools.wraps(collective)
    def call(output: Tensor, given: Tensor, *args: object, group: dist.ProcessGroup, **kwargs: object) -> T | None:
        if group.size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, *args, group=group, **kwargs)

    return call


_RANDOM = "megatron.core.tensor_parallel.random"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
CPU_PATCHES = (
    Patch("torch.cuda", ("current_device",), lambda _: _returning(CPU), "Device of buffers and scalars."),
    Patch("torch.cuda", ("current_stream",), lambda _: _returning(None), "Called by 0.19 before it reduces gradients."),
    Patch("torch", ("tensor", "zeros"), _on_cpu, 'device="cuda" is literal in the optimizer and the schedules.'),
    Patch(
        "torch.cuda",
        ("get_rng_state",),
        lambda _: lambda *a, **k: torch.get_rng_state(),
        "The tensor-parallel RNG tracker keeps states of the CUDA generator.",
    ),
    Patch("torch.cuda", ("manual_seed",), lambda _: torch.manual_seed, "The RNG tracker seeds each of its states."),
    Patch(
        _RANDOM,
        ("_get_cuda_rng_state",),
        lambda _: lambda *a, **k: torch.get_rng_state(),
        "The RNG tracker accesses the default CUDA generator by index.",
    ),
    Patch(_RANDOM, ("_set_cuda_rng_state",), lambda _: lambda state, *a, **k: torch.set_rng_state(state), "The same."),
    Patch(
        _BUFFERS,
        ("dist_reduce_scatter_func", "dist_all_gather_func"),
        _unless_alone,
        "Speed: no copies for groups of one rank.",
    ),
)


def _without_graph_break(step: Callable[..., T]) -> Callable[..., T]:
    """A step of torch.optim, whose decorators all call functions of torch's compiler but the innermost."""

    innermost = inspect.unwrap(step)

    @functools.wraps(innermost)
    def run(self: torch.optim.Optimizer, *args: object, **kwargs: object) -> T:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return innermost(self, *args, **kwargs)

    return run


_WHY = (
    "It calls torch's compiler to be left out of it, which loads it: a second of every rank's start, for nothing here."
)
COMPILER_PATCHES = (
    Patch("torch.optim.AdamW", ("step",), _without_graph_break, _WHY),
    Patch("torch.optim.Optimizer", ("add_param_group", "load_state_dict", "state_dict"), inspect.unwrap, _WHY),
    Patch("torch.optim.Optimizer", ("zero_grad",), inspect.unwrap, _WHY),
)


_installed: Saved = []


def install(patches: Sequence[Patch] = CPU_PATCHES) -> bool:
    """Installs the patches where CUDA is absent, once. Returns whether any are installed."""
    if torch.cuda.is_available():
        return False
    if not _installed:
        # `with torch.device(...)` recognizes factories by identity and caches them at first use: cache the originals.
        _device_constructors()
        for patch in patches:
            _installed.extend(patch.apply())
    return True


_kept_from_compiler: Saved = []


def keep_from_compiler() -> None:
    """Lets optimizers step without loading torch's compiler. Applied once, unless it is loaded already."""
    if not _kept_from_compiler and "torch._dynamo" not in sys.modules:
        for patch in COMPILER_PATCHES:
            _kept_from_compiler.extend(patch.apply())


def undo() -> None:
    """Removes the patches that `install` and `keep_from_compiler` have installed."""
    for saved in (_installed, _kept_from_compiler):
        restore(saved)
        saved.clear()


def _no_compile(function: Any = None, **options: Any) -> Any:
    return function if function else lambda decorated: decorated


def _not_for_megatron(is_available: Callable[[], bool]) -> Callable[[], bool]:
    def answer() -> bool:
        asks = sys._getframe(1).f_globals["__name__"]  # pyright: ignore[reportPrivateUsage]
        return not asks.startswith("megatron.") and is_available()

    return answer


IMPORT_PATCHES = (
    Patch(
        "torch",
        ("compile",),
        lambda _: _no_compile,
        "Megatron-Core decorates layers that are not used here; loading torch's compiler for them would double the "
        "import time.",
    ),
    Patch(
        "torch.cuda",
        ("is_available",),
        _not_for_megatron,
        "0.19 calls it at import (dist_checkpointing/strategies/torch.py) to decide on support for TransformerEngine's "
        "FP8 tensors, which is not used here; the call may initialize the CUDA driver.",
    ),
)


HIDDEN_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
"""What ops calls of them is verified first. Megatron-Core would call kernels that nothing has verified, and would not
import itself beside a package that is broken or of a version that it does not know."""


def import_core() -> ModuleType:
    """Imports Megatron-Core and the modules that the CPU patches change. Does not initialize CUDA, so that the process
    can still be forked."""
    hidden = HIDDEN_PACKAGES
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except Exception:  # of which Megatron-Core catches ImportError alone
        hidden += ("fused_weight_gradient_mlp_cuda",)
    with patched(*IMPORT_PATCHES), absent(*hidden):
        import megatron.core
        from megatron.core.distributed import (
            param_and_grad_buffer,  # noqa: F401  # pyright: ignore[reportUnusedImport]
        )
        from megatron.core.tensor_parallel import random  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from megatron.core.transformer import (  # which its schedules import in the first step
            multi_token_prediction,  # noqa: F401  # pyright: ignore[reportUnusedImport]
        )
    return megatron.core


def load() -> ModuleType:
    """Imports Megatron-Core and installs the CPU patches if CUDA is absent. Call it before anything else imports
    Megatron-Core; a later call only makes the import slower."""
    core = import_core()
    install()
    return core


def _cuda_name(type_of: Callable[..., T]) -> Callable[..., T | str]:
    def named_cuda(self: Tensor, *args: object, **kwargs: object) -> T | str:
        result = type_of(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.")
        return result

    return named_cuda


@contextlib.contextmanager
def cuda_type_names() -> Generator[None]:
    """Inside, and without CUDA, `tensor.type()` returns the name of the CUDA type. Entered while get_megatron_optimizer
    runs, which sorts parameters by strings such as 'torch.cuda.BFloat16Tensor'; not for longer, because other libraries
    call tensor.type() too."""
    patches = [] if torch.cuda.is_available() else [Patch("torch.Tensor", ("type",), _cuda_name, "Types by name.")]
    with patched(*patches):
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
def without_streams() -> Generator[None]:
    """Inside, and without CUDA, torch.cuda.Stream() returns None. Entered while DistributedDataParallel is built, which
    with several optimizer instances creates a stream that only overlap_grad_reduce uses."""
    patch = Patch("torch.cuda", ("Stream",), lambda _: _returning(None), "Streams that are not used.")
    with patched(*([] if torch.cuda.is_available() else [patch])):
        yield


@contextlib.contextmanager
def layers_made_on(device: torch.device) -> Generator[None]:
    """Inside, Megatron-Core's layers are created on `device` instead of torch.cuda.current_device()."""
    with patched(Patch("torch.cuda", ("current_device",), lambda _: _returning(device), "Shapes without memory.")):
        yield


def name_missing_gemm() -> None:
    """Lets Megatron-Core's own router run without TransformerEngine: 0.16.1 compares `te_general_gemm` with None, but
    defines it only if TransformerEngine is installed. 0.19 always defines it."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def moe_layer(config: Any) -> nn.Module:
    """Megatron-Core's own MoE layer, for comparisons. Its specification is a ModuleSpec in 0.16 and a function in
    0.19."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    name_missing_gemm()
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    if is_since(0, 19):
        build = cast("Callable[..., nn.Module]", spec)
    else:
        build = functools.partial(cast("Callable[..., nn.Module]", spec.module), submodules=spec.submodules)
    return build(config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def replace_linear_product(module: nn.Module, product: Callable[..., Tensor]) -> None:
    """Makes every tensor-parallel linear layer in `module` compute its matrix product with `product`. The layers have
    no argument for it.

    Args:
        product: (x [S, B, K], w [N, K], whether to all-gather x over the group first, whether to all-reduce the
            gradient of x over the group, the group) -> [S, B, N].
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def forward_impl(input: Tensor, weight: Tensor, bias: None, **options: Any) -> Tensor:
        assert bias is None
        return product(input, weight, options["sequence_parallel"], options["allreduce_dgrad"], options["tp_group"])

    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer._forward_impl = forward_impl  # pyright: ignore[reportPrivateUsage]


def leave_out_gradients(module: nn.Module) -> None:
    """For a model that is not trained: its linear layers multiply without the autograd functions that a backward pass
    needs, and with a group of one neither copy to it nor sum over it. On a CPU these functions take longer than the
    product of a token. The products of replace_linear_product stay."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def forward_impl(input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        y = torch.matmul(input, weight.t())  # as Megatron-Core multiplies
        return y if bias is None else y + bias

    for layer in module.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or layer.sequence_parallel:
            continue
        if "_forward_impl" not in vars(layer):
            layer._forward_impl = forward_impl  # pyright: ignore[reportPrivateUsage]
        if isinstance(layer, ColumnParallelLinear):
            layer.disable_grad_reduce = True
        elif cast(Any, layer).tp_group.size() == 1 and layer.skip_bias_add:
            layer.explicit_expert_comm = True  # leaves the sum to others


def linear_product(x: Tensor, weight: nn.Parameter, group: dist.ProcessGroup, *, fuse_weight_gradient: bool) -> Tensor:
    """x [S, B, K] @ weight.T [S, B, N] as Megatron-Core's linear layers compute it, without messages to the group."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    return linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        None,
        gradient_accumulation_fusion=fuse_weight_gradient,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=group,
    )


def has_weight_gradient_kernel() -> bool:
    """Whether Megatron-Core's linear layers have found the kernel of gradient_accumulation_fusion. They look for it
    when they are imported."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available  # pyright: ignore[reportPrivateUsage]


@functools.cache
def is_since(major: int, minor: int) -> bool:
    """Whether Megatron-Core's version is at least this."""
    import megatron.core

    return tuple(int(n) for n in megatron.core.__version__.split(".")[:2]) >= (major, minor)


def parameters_in_norm(optimizer: Any) -> list[nn.Parameter]:
    """The shards of a distributed optimizer that count in the gradient norm on this rank: replicated parameters count
    on one rank. Megatron-Core's own function has another name in 0.19 and reads only each shard's `grad`."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate as is_counted
    from megatron.core.transformer.module import param_is_not_shared

    names = ("tp_group", "expert_tp_group") if is_since(0, 19) else ("tp_group",)
    groups = {name: getattr(optimizer, name, None) for name in names}  # an optimizer without parameters has no groups
    return [p for p in optimizer.get_parameters() if param_is_not_shared(p) and is_counted(p, **groups)]


def replace_inner_optimizer(optimizer: Any, inner: torch.optim.Optimizer) -> None:
    """Replaces the optimizer that a distributed optimizer steps with by one that writes the model weights itself. The
    copy from fp32 shards to model weights, which has no argument to turn it off, is disabled."""
    optimizer.optimizer = inner
    optimizer._copy_main_params_to_model_params = lambda: None


def optimizer_range(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """(start, end) of this rank's shard of a flattened parameter in a distributed optimizer. Only a private method
    returns it."""
    found = optimizer._get_model_param_range_map(parameter)["param"]
    return found.start, found.end


def shard_ranges(chunk: Any, parameter: nn.Parameter) -> list[tuple[int, int]]:
    """(start, end) of the shard of a flattened parameter that each rank of the distributed optimizer's group holds, as
    Megatron-Core's DistributedOptimizer._build_model_gbuf_range computes it for one rank.

    Args:
        chunk: the DistributedDataParallel that has the parameter.
    """
    buffer = next(b for b in (*chunk.buffers, *chunk.expert_parallel_buffers) if parameter in b.param_index_map)
    start, end, bucket_index = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_index]
    size = bucket.grad_data.numel() // buffer.data_parallel_world_size
    firsts = [bucket.offset + rank * size - start for rank in range(buffer.data_parallel_world_size)]
    return [(min(max(first, 0), end - start), min(max(first + size, 0), end - start)) for first in firsts]
