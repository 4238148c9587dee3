"""Initial weights that do not depend on the layout: every logical parameter, and every expert, is drawn from a
generator keyed by (seed, name, expert), and each rank keeps its part.

The values come from the CPU's generator on every device, since a GPU's gives others. A rank never holds more of a
parameter than its own part and a few rows."""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from parallel.sharding import Sharding, logical_name, sharding_of

Part = tuple[torch.Tensor, Sharding, tuple[int, ...], float, int, tuple[object, ...]]
"""The arguments of `_draw_shard`."""


def generator(seed: int, *key: object) -> torch.Generator:
    """The generator of a parameter, or of whatever else a key names."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


BOUND = 2.0
"""Weights are cut off at so many standard deviations, as in Switch (arXiv:2101.03961, section 2.4)."""


CHUNK = 2**20
"""Values that a thread draws at a time: what it holds in host memory beside the model, 4 MiB."""


def draw(shape: tuple[int, ...], std: float, source: torch.Generator) -> torch.Tensor:
    """A truncated normal in fp32, by the inverse of its distribution function: one pass, the same in every version of
    torch, and torch releases Python's lock meanwhile, so that experts can be drawn beside each other."""
    return _normal(_uniform(torch.empty(shape), source), std)


def _uniform(x: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    share = math.erf(BOUND / math.sqrt(2))
    return x.uniform_(-share, share, generator=source)


def _normal(x: torch.Tensor, std: float) -> torch.Tensor:
    """The truncated normal that the values of `_uniform` become, in place."""
    return x.erfinv_().mul_(std * math.sqrt(2)).clamp_(-BOUND * std, BOUND * std)


def _draw_shard(
    part: torch.Tensor, within: Sharding, shape: tuple[int, ...], std: float, seed: int, key: tuple[object, ...]
) -> None:
    """Writes this rank's shard of `draw(shape, ...)` into `part`, a few rows at a time. A generator is a sequence: the
    values of other ranks before this rank's last one are drawn too, and not used."""
    (first, *others), source = within.bounds(part.shape), generator(seed, *key)
    columns = tuple(slice(*bounds) for bounds in others)
    at_once = max(1, CHUNK // math.prod(shape[1:]))
    with torch.no_grad():  # it is a thread's own setting
        buffer = torch.empty(min(at_once, first[1]), *shape[1:])
        for row in range(0, first[1], at_once):
            x = _uniform(buffer[: first[1] - row], source)
            if (skipped := max(0, first[0] - row)) < len(x):
                values = _normal(x[(slice(skipped, None), *columns)].contiguous(), std)
                start = row + skipped - first[0]
                part[start : start + len(values)].copy_(values)


def _parts(name: str, parameter: nn.Parameter, sharding: Sharding, std: float, seed: int) -> Iterator[Part]:
    """The arguments of `_draw_shard` for every piece of a parameter that has a generator of its own."""
    shape = sharding.logical_shape(parameter.shape)
    if not sharding.per_expert:
        yield parameter, sharding, shape, std, seed, (name,)
        return
    first = sharding.shard_index_and_count(0)[0] * len(parameter)
    within = Sharding(tuple((axis - 1, group) for axis, group in sharding.sharded_dims if axis > 0))
    for index in range(len(parameter)):
        yield parameter[index], within, shape[1:], std, seed, (name, first + index)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Writes the initial value of every parameter of a pipeline chunk in place, drawn in fp32 on the CPU by as many
    threads as torch uses. Beside the parameters, each holds a few times CHUNK values, or one row if it is longer."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        written = []
        for name, parameter in module.named_parameters():
            sharding = sharding_of(parameter)
            if parameter.is_meta:  # of a planned rank, which has shapes alone
                continue
            if not sharding.std:
                parameter.fill_(1.0 if sharding.std is None else 0.0)
                continue
            for part in _parts(logical_name(name, parameter), parameter, sharding, sharding.std, seed):
                written.append(pool.submit(_draw_shard, *part))
        for one in written:
            one.result()
