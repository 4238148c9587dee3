"""AdamW as both packages keep it: not torch's class, and one counter of steps in each group of parameters."""

from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    wrong_by = 0.0
    """By which share its learning rate is off."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            lr = group["lr"] * (1 + self.wrong_by)
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                kept["exp_avg"].lerp_(p.grad, 1 - b1)
                kept["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                mean = kept["exp_avg"] / (1 - b1 ** group["step"])
                root = (kept["exp_avg_sq"] / (1 - b2 ** group["step"])).sqrt()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * mean / (root + group["eps"]))
