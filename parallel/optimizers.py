"""The optimizers: what each keeps of a parameter, and how it updates a block of elements."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.registry import Registry
from parallel.sharding import sharding_of


@dataclass(frozen=True)
class Update:
    """A block of elements of a parameter, fp32, wherever weights and state are kept and in whatever precision."""

    weight: Tensor
    """[n], to be changed in place."""
    gradient: Tensor
    """[n], clipped; not to be changed."""
    state: dict[str, Tensor]
    """[n] of each name in Optimizer.state, to be changed in place; zeros before the first update."""
    step: int
    """Counted from 1."""
    lr: float
    weight_decay: float
    """0 where the parameter has none."""
    betas: tuple[float, float]
    """optim.beta1 and beta2."""
    eps: float


@dataclass(frozen=True)
class Optimizer:
    """A value of optim.name whose update of an element depends on that element alone, so that every layout may share
    out parameters as it likes."""

    name: str
    state: tuple[str, ...]
    """What is kept of each element, two at most: the prefixes of the tensors in a checkpoint."""
    update: Callable[[Update], None]
    matrix_state: tuple[str, ...] | None = None
    """What Muon keeps of each element of a hidden layer's matrix (Sharding.matrices), whose update looks at the whole
    matrix (parallel/whole_matrices.py). None: matrices are updated as all else."""

    def state_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What is kept of each element of a parameter."""
        return self.state if self.matrix_state is None or sharding_of(parameter).matrices is None else self.matrix_state

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that is kept of any parameter."""
        return (*self.state, *(self.matrix_state or ()))


def _adamw(block: Update) -> None:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101, algorithm 2), by torch's fused kernel."""
    count = torch.full((), block.step, dtype=torch.float32, device=block.weight.device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage]
        [block.weight], [block.gradient], [block.state["exp_avg"]], [block.state["exp_avg_sq"]], [], [count],
        lr=block.lr, beta1=block.betas[0], beta2=block.betas[1], weight_decay=block.weight_decay, eps=block.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _check(optimizer: Optimizer) -> None:
    if optimizer.matrix_state is not None:
        raise ValueError(f"optimizer {optimizer.name}: only muon has a matrix_state")
    if len(optimizer.state) > 2 or "weights" in optimizer.state or any("." in name for name in optimizer.state):
        raise ValueError(
            f"optimizer {optimizer.name}: it keeps {', '.join(optimizer.state)}; at most two tensors can be kept of a "
            "parameter, under names without a dot and other than weights"
        )

    def updated(size: int) -> Tensor:
        weight, gradient = torch.ones(size), torch.linspace(-1, 1, 8)[:size].clone()
        state = {name: torch.zeros(size) for name in optimizer.state}
        optimizer.update(Update(weight, gradient, state, 1, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8))
        return weight

    if not torch.allclose(updated(8)[:4], updated(4)):
        raise ValueError(f"optimizer {optimizer.name}: the update of an element depends on other elements")


_MOMENTS = "exp_avg", "exp_avg_sq"
OPTIMIZERS = Registry(
    "optimizer",
    Optimizer("adamw", _MOMENTS, _adamw),
    Optimizer("muon", _MOMENTS, _adamw, matrix_state=("momentum_buffer",)),
    check=_check,
)
