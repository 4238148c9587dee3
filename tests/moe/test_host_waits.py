"""How often the host waits for the device in a sparse layer, forward and backward together. Counted where there is no
device to wait for: by the operations whose results the host reads, or whose sizes it has to know."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import MoeConfig, ParallelConfig
from models.init import initialise
from moe.dispatcher import DISPATCHERS
from moe.layer import MoELayer
from ops.experts import experts_by
from ops.implementations import Ops
from parallel.env import World
from parallel.process_groups import Runtime
from tests.moe.helpers import expert_backend, random, run_layer, tiny
from tests.parallel.helpers import started

SIZE_DEPENDS_ON_VALUES = (
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_consecutive",
    "_local_scalar_dense",
)
FROM_HOST = {torch.tensor, torch.as_tensor, torch.scalar_tensor}
TO_HOST = {Tensor.tolist, Tensor.cpu, Tensor.numpy}


class CountWaits(TorchDispatchMode):
    """Names of what waits. Enter both: operations (also of the backward pass), and the functions that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.functions = CountCopies(self.found)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if (name in SIZE_DEPENDS_ON_VALUES or masks or repeats) and not self.functions.inside:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.inside = found, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        blocking = function is Tensor.to and any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        blocking = blocking and not kwargs.get("non_blocking")
        counts = function in TO_HOST or (function in FROM_HOST and kwargs.get("device") is not None) or blocking
        if not counts:
            return function(*args, **kwargs)
        self.found.append(function.__name__)
        self.inside += 1  # a list of n numbers is read at once
        try:
            return function(*args, **kwargs)
        finally:
            self.inside -= 1


def waits(runtime: Runtime, backend: str, dispatcher: str, **moe: Any) -> list[str]:
    """Of a second pass: the first one may prepare what is kept."""
    model = tiny(MoeConfig(num_experts=4, **moe), hidden_size=16, ffn_hidden_size=16)
    layer = MoELayer(
        model,
        ops=Ops(experts=expert_backend(backend), dispatcher=DISPATCHERS[dispatcher]),
        dtype=torch.float32,
        sequence_parallel=False,
        groups=runtime.groups,
        draws=(1, 0),
    )
    initialise(layer, 1)
    for _ in range(2):
        mode = CountWaits()
        x_SBD = random(8, 2, 16).requires_grad_()
        with mode, mode.functions:
            run_layer(layer, x_SBD).square().sum().backward()
    return mode.found


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dropless_layer_waits_once(backend: str, bias: bool, runtime: Runtime) -> None:
    found = waits(runtime, backend, "local", top_k=2, capacity_factor=None, expert_bias=bias)
    assert found == ["tolist"]


@pytest.mark.parametrize("drop_policy", ["position", "probability", "random"])
def test_a_padded_layer_never_waits(drop_policy: str, runtime: Runtime) -> None:
    assert waits(runtime, "grouped_mm", "local", top_k=2, pad_to_capacity=True, drop_policy=drop_policy) == []


def test_the_count_sees_what_waits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
        return torch.nn.functional.grouped_mm(x, w, offs=torch.tensor(counts, device=x.device).cumsum(0).int())

    monkeypatch.setattr("ops.experts.grouped_experts", partial(experts_by, product))
    found = waits(runtime, "grouped_mm", "local", top_k=2, capacity_factor=None)
    assert sorted(found) == ["tensor", "tensor", "tolist"]
    mode = CountWaits()
    x = random(5)
    with mode, mode.functions:
        x[x > 0].sum().item()
        x.nonzero()
        bool(x.sum() > 0)
    assert len(mode.found) == 4


def waits_on_rank(world: World, parallel: dict[str, int], dispatcher: str, padded: bool, parts: int = 1) -> list[str]:
    moe: dict[str, Any] = {"pad_to_capacity": True} if padded else {"capacity_factor": None}
    moe["overlap_degree"] = parts
    with started(world, ParallelConfig(**parallel)) as runtime:
        return waits(runtime, "grouped_mm", dispatcher, top_k=2, **moe)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"etp": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_dispatchers_wait_once_and_padded_never(parallel: dict[str, int], dispatcher: str, padded: bool, ranks) -> None:
    for found in ranks.run(2, waits_on_rank, parallel, dispatcher, padded, timeout=120):
        assert len(found) == (0 if padded else 1), found


@pytest.mark.parametrize("padded", [False, True])
def test_rows_in_parts_wait_no_more_often(padded: bool, ranks) -> None:
    for found in ranks.run(2, waits_on_rank, {"ep": 2}, "all_to_all", padded, 2, timeout=120):
        assert len(found) == (0 if padded else 1), found
