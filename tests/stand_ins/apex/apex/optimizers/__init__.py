"""Stands for apex.optimizers."""

from typing import Any

from tests.stand_ins.fused_adam import GroupStepAdam


class FusedAdam(GroupStepAdam):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        assert bias_correction and adam_w_mode and not amsgrad and not capturable and not master_weights
        super().__init__(params, lr, betas, eps, weight_decay)
