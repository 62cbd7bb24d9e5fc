"""Seeded noise: what a method must beat."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.registry import SCORERS
from kvcompress.shapes import Importance, LayerContext
from kvcompress.stages import Scorer

_BITS = 32
_MASK = 2**_BITS - 1


@SCORERS.register("random")
class Random(Scorer):
    """Noise, uniform in (0, 1), that depends on seed, layer, head and the tokens before a slot's own alone.

    Source: none, a baseline; the noise is an integer hash of counters, in the way of Salmon et al. (Parallel Random
    Numbers: As Easy as 1, 2, 3, 2011).

    So a token has the same score in any batch, chunk or turn, and on any device.

    Args:
        seed: another seed gives other noise.
    """

    mass: ClassVar[bool] = True

    seed: int = 0

    def score(self, layer: LayerContext) -> Importance:
        """Hashes the head into a key of the layer, then the number of tokens before into the head's."""
        key = random.Random(f"{self.seed} {layer.layer}").getrandbits(_BITS)
        heads = torch.arange(layer.keys.shape[1], device=layer.keys.device)[:, None]
        bits = _hashed(_hashed(key ^ heads) ^ layer.index.long())
        return ((bits >> _BITS - 23).float() + 0.5) / 2**23


def _hashed(number: Tensor) -> Tensor:
    """Mixes 32 bits held in int64; factors below 2**31, so that no product overflows."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD & _MASK
    number = (number ^ (number >> 15)) * 0x735A2D97 & _MASK
    return number ^ (number >> 15)
