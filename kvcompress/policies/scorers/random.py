"""Seeded noise: what a method must beat."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.noise import noise
from kvcompress.policies.registry import SCORERS


@SCORERS.register("random")
class Random(Scorer):
    """Noise, uniform in (0, 1), that depends on seed, layer, head and the tokens before a slot's own alone.

    Source: none, a baseline (see `kvcompress.policies.noise`).

    So a token has the same score in any batch, chunk or turn, and on any device.

    Args:
        seed: another seed gives other noise.
    """

    mass: ClassVar[bool] = True
    independent: ClassVar[bool] = True

    seed: int = 0

    def score(self, layer: LayerContext) -> Importance:
        """Hashes the head into a key of the layer, then the number of tokens before into the head's."""
        count = layer.keys.shape[1]
        heads = layer.heads.first(count) + torch.arange(count, device=layer.keys.device)[:, None]
        return noise(f"{self.seed} {layer.layer}", layer.index, heads)
