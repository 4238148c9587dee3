"""The experts' products by TransformerEngine's grouped product, with the stand-in for the package."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import MoeConfig, OptimConfig
from moe.chunked_experts import InPieces
from moe.expert_parts import split_weight
from ops.experts import EXPERTS, loop_experts
from ops.gemm_backend import Reference
from ops.operation import Row
from ops.te_grouped_gemm import TeGemmBackend
from parallel.process_groups import Runtime
from tests.moe.helpers import as_routed, assert_close, expert_backend, random, run_context, selected, tiny, try_on
from tests.stand_ins import installed
from tests.stand_ins.signatures import table
from tests.stand_ins.versions import as_version

CUDA = torch.device("cuda")
COUNTS = [3, 0, 2, 1]


@pytest.fixture(autouse=True)
def transformer_engine() -> Iterator[None]:
    with installed("transformer_engine"):
        yield


def weights(main_grad: bool) -> list[nn.Parameter]:
    """w_in [4, 8, 2, 4] and w_out [4, 4, 8], as Megatron-Core's buckets leave them."""
    made = [nn.Parameter(random(4, 8, 2, 4, seed=1)), nn.Parameter(random(4, 4, 8, seed=2))]
    for weight in made if main_grad else ():
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    return made


def run(parameters: list[nn.Parameter], x_RD: Tensor, by: Callable[..., Tensor]) -> None:
    by(x_RD, COUNTS, *parameters, "swiglu", None, None).square().sum().backward()


def gradients_of_loop(micro_batches: int) -> list[Tensor]:
    parameters = weights(False)
    for i in range(micro_batches):
        run(parameters, random(6, 8, seed=10 + i), loop_experts)
    return [p.grad for p in parameters]


def te(*args: Any) -> Tensor:
    x_RD, *more = args
    rows = as_routed(x_RD)
    return expert_backend("te").run(rows.x_TD, *more, rows.indices)


@pytest.mark.parametrize("version", table()["transformer_engine"])
def test_gradients_of_micro_batches_add_up_in_the_main_gradient(version: str) -> None:
    """As every recorded version takes the call. What autograd gets has no meaning, and is not added."""
    parameters = weights(True)
    with as_version("transformer_engine", version) as called:
        for i in range(2):
            run(parameters, random(6, 8, seed=10 + i), te)
    assert "transformer_engine.pytorch.cpp_extensions.general_grouped_gemm" in called
    for parameter, wanted in zip(parameters, gradients_of_loop(2), strict=True):
        assert parameter.grad_added_to_main_grad
        assert_close(parameter.main_grad, wanted)


def test_no_weight_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operands of the product are the parameters' own memory, and so is what gradients are added to."""
    import transformer_engine.pytorch.cpp_extensions as extensions

    right, seen = extensions.general_grouped_gemm, []

    def spy(A: list[Tensor], B: list[Tensor], out: list[Tensor], *args: Any, **how: Any) -> Any:
        seen.append(({t.untyped_storage().data_ptr() for t in (*A, *B, *out)}, how["layout"]))
        return right(A, B, out, *args, **how)

    spy.__signature__ = inspect.signature(right)
    monkeypatch.setattr(extensions, "general_grouped_gemm", spy)
    parameters = weights(True)
    run(parameters, random(6, 8), te)
    w_in, w_out = ({p.untyped_storage().data_ptr()} for p in parameters)
    main_in, main_out = ({p.main_grad.untyped_storage().data_ptr()} for p in parameters)
    assert [layout for _, layout in seen] == ["NN", "NN", "TN", "TN", "NT", "NT"]
    reads = [w_in, w_out, w_out, w_in, main_out, main_in]
    assert all(wanted <= found for wanted, (found, _) in zip(reads, seen, strict=True))


def test_parts_and_pieces_of_experts_add_to_their_part() -> None:
    """model.moe.overlap_degree, and model.moe.expert_chunk_rows."""
    parameters, x_RD = weights(True), random(6, 8, seed=10)
    parts = zip(*(split_weight(p, 2) for p in parameters), strict=True)
    halves = [
        te(x, c, *w, "swiglu", None, None) for x, c, w in zip(x_RD.split([3, 3]), ([3, 0], [2, 1]), parts, strict=True)
    ]
    torch.cat(halves).square().sum().backward()
    for parameter, wanted in zip(parameters, gradients_of_loop(1), strict=True):
        assert_close(parameter.main_grad, wanted)

    def piece(rows: slice, x: Tensor, counts: Any, *w: Tensor) -> Tensor:
        return te(x, counts, *w, "swiglu", None, None)

    pieces = weights(False)
    InPieces.apply(piece, 2, COUNTS, x_RD.requires_grad_(), *pieces).square().sum().backward()
    for parameter, wanted in zip(pieces, gradients_of_loop(1), strict=True):
        assert_close(parameter.grad, wanted)


def row(runtime: Runtime, backend: str, **settings: Any) -> Row:
    model = tiny(MoeConfig(num_experts=4, backend=backend))
    return selected(EXPERTS, run_context(model, runtime, torch.bfloat16, CUDA, **settings))[1]


def test_it_is_tried_before_it_is_used(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which pretends to be a GPU: a product that is off, and one that forgets what was there before, are left
    out with the reason."""
    import transformer_engine.pytorch.cpp_extensions as extensions

    try_on(runtime.device, EXPERTS, monkeypatch)
    monkeypatch.setattr("ops.experts._activations", lambda context: Reference())
    assert row(runtime, "te").name == "te"
    right = extensions.general_grouped_gemm

    def off(of: str) -> Callable[..., None]:
        """By 5 % in bf16, in one of forward pass (NN), input gradient (TN) and weight gradient (NT)."""

        def gemm(
            A: Any, B: Any, out: Any, quantization_params: Any, out_dtype: Any, layout: str = "TN", **how: Any
        ) -> None:
            right(A, B, out, quantization_params, out_dtype, layout, **how)
            [t.mul_(1.05) for t in out if layout == of and A[0].dtype == torch.bfloat16]

        return gemm

    def forgets(
        A: Any, B: Any, out: Any, quantization_params: Any, out_dtype: Any, accumulate: bool = False, **how: Any
    ) -> None:
        right(A, B, out, quantization_params, out_dtype, **how)

    def writes_where_no_row_is(A: Any, B: Any, out: Any, *args: Any, layout: str = "TN", **how: Any) -> None:
        right(A, B, out, *args, layout=layout, **how)
        [t.add_(1.0) for t, rows in zip(out, B, strict=False) if layout == "NT" and not len(rows)]

    writes_where_no_row_is.__signature__ = inspect.signature(right)
    for wrong in (off("NN"), off("TN"), off("NT"), writes_where_no_row_is, forgets):
        monkeypatch.setattr(extensions, "general_grouped_gemm", wrong)
        with pytest.raises(ValueError, match=r"backend=te differs from the reference by .*backend=loop"):
            row(runtime, "te")
        found = row(runtime, "auto")
        assert found.name != "te" and "te differs from the reference by " in found.why and found.refused
    # Where gradients are added up in bf16, they are returned.
    assert row(runtime, "te", optim=OptimConfig(grad_dtype="bf16")).name == "te"


def test_rows_without_a_row_need_no_product() -> None:
    backend = TeGemmBackend(Reference())
    w_LKN = random(2, 8, 4)
    assert backend.product(random(0, 8), backend.weight(w_LKN).forward, [0, 0], torch.float32).shape == (0, 4)
    dw = backend.weight_gradient((random(0, 8),), (random(0, 4),), [0, 0], w_LKN)
    assert dw.shape == w_LKN.shape and not dw.any()
