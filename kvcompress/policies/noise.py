"""Noise that depends on a seed and a counter alone, so that it is the same in any batch and on any device.

An integer hash of counters, in the way of Salmon et al. (Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
"""

from __future__ import annotations

import random

from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.kernels import sent

_BITS = 32
_MASK = 2**_BITS - 1


def noise(seed: str, counter: Int[Tensor, "*shape"], stream: Int[Tensor, "..."] | int = 0) -> Float[Tensor, "..."]:
    """Numbers in (0, 1), a multiple of 2**-24 each.

    Args:
        seed: names a source of noise.
        counter: non-negative numbers, each with noise of its own.
        stream: numbers of independent streams, of a shape that broadcasts with `counter`.
    """
    key = sent(stream, counter.device) ^ random.Random(seed).getrandbits(_BITS)
    bits = _hashed(_hashed(key) ^ counter.long())
    return ((bits >> _BITS - 23).float() + 0.5) / 2**23


def _hashed(number: Tensor) -> Tensor:
    """Mixes 32 bits held in int64; factors below 2**31, so that no product overflows."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD & _MASK
    number = (number ^ (number >> 15)) * 0x735A2D97 & _MASK
    return number ^ (number >> 15)
