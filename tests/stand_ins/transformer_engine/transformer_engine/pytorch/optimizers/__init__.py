"""Stands for transformer_engine.pytorch.optimizers."""

from typing import Any

from tests.stand_ins.fused_adam import GroupStepAdam


class FusedAdam(GroupStepAdam):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ):
        assert bias_correction and adam_w_mode and not amsgrad
        super().__init__(params, lr, betas, eps, weight_decay)
