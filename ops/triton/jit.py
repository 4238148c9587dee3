"""triton.jit, with the types of what it makes: Triton's own stubs let a kernel be launched with constants of Triton's
compiler alone, and without num_warps and num_stages."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:

    class Kernel(Protocol):
        """A compiled kernel. What a kernel is called with is checked when it is compiled."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            """Its launch on the grid: of tensors, numbers, and num_warps and num_stages."""
            ...

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            """Within another kernel."""
            ...

    @overload
    def jit(function: Callable[..., Any]) -> Kernel: ...
    @overload
    def jit(*, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], Kernel]: ...
    def jit(function: Any = None, **options: Any) -> Any: ...

else:
    from triton import jit

__all__ = ["jit"]
