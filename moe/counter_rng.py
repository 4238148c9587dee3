"""Random numbers that belong to a token and not to a rank: a hash of what is asked for, so that every layout, every
device and every repetition of a pass (recompute, a resumed run) sees the same ones.

Legend: R rows (tokens, or choices of tokens), W numbers per row.
"""

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9


def key(*parts: int | str) -> int:
    """A number of 62 bits for (seed, purpose, step, micro-batch, layer, ...)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 2


def uniform(key: int, rows_R: Tensor, width: int) -> Tensor:
    """fp32 [R, W] in [0, 1), in steps of 2**-24.

    Args:
        key: from `key`.
        rows_R: int64; what names each row within the whole micro-batch.
    """
    # Widely spaced seeds of the rows (splitmix64, Steele et al. 2014), then a cheaper hash of 32 bits along the row
    # (lowbias32 of C. Wellons' hash prospector): the second pass is W times as long. Integers wrap around.
    seed_R = rows_R + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        seed_R = (seed_R ^ _shifted(seed_R, shift, 64)) * factor
    seed_R = seed_R ^ _shifted(seed_R, 31, 64)
    column_W = torch.arange(width, device=rows_R.device, dtype=torch.int64) * GOLDEN
    bits_RW = _low_half(seed_R)[:, None] ^ _low_half(column_W)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        bits_RW ^= _shifted(bits_RW, shift, 32)
        bits_RW *= factor
    return _shifted(bits_RW ^ _shifted(bits_RW, 16, 32), 8, 32).float() * 2.0**-24


def _shifted(x: Tensor, by: int, bits: int) -> Tensor:
    """x >> by, with zeros coming in from the left: torch's shift repeats the sign."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def _low_half(x: Tensor) -> Tensor:
    """The lower 32 bits as int32."""
    return ((x << 32) >> 32).to(torch.int32)
