"""Initial weights that do not depend on the layout: every logical parameter, and every expert, is drawn from a
generator keyed by (seed, name, expert), and each rank keeps its part."""

import hashlib

import torch
from torch import nn

from parallel.placement import Placement, logical_name


def _generator(seed: int, *key: object) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    # Cut at two standard deviations, as in Switch (section 2.4).
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator)


def initial_value(name: str, local_shape: torch.Size, placement: Placement, seed: int) -> torch.Tensor:
    """This rank's part of a logical parameter's initial value, fp32 on the CPU."""
    if placement.std is None:
        return torch.ones(local_shape)
    if placement.std == 0:
        return torch.zeros(local_shape)
    shape = placement.logical_shape(local_shape)
    if not placement.per_expert:
        return placement.cut(_draw(shape, placement.std, _generator(seed, name)))
    part, _ = placement.offset_and_size(0)
    first = part * local_shape[0]
    within = Placement(tuple((axis - 1, group) for axis, group in placement.cuts if axis > 0))
    experts = range(first, first + local_shape[0])
    return torch.stack([within.cut(_draw(shape[1:], placement.std, _generator(seed, name, e))) for e in experts])


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Writes the initial value of every parameter of a pipeline chunk in place."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:  # of a planned rank, which has shapes alone
            continue
        key = logical_name(name, parameter)
        parameter.copy_(initial_value(key, parameter.shape, parameter.placement, seed))
