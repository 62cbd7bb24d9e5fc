"""LagKV: how far keys and values spread, measured by the tokens that come next."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS

_LEAST_RANGE = 1e-6  # of a channel that is constant over a partition


@SCORERS.register("lagkv")
class LagKV(Scorer):
    """Spread of keys and values over their channels, relative to the range that the next partition has in each.

    Source: LagKV (arXiv 2504.04704).

    After the sinks, slots form partitions of `lag`. A partition is scaled by the minimum and maximum of each channel in
    the next one; a slot's score is the standard deviation over the scaled channels as a softmax within its partition,
    of its key plus of its value. Sinks, the last whole partition and what follows it have no score of their own.

    *Deviates:* the paper keeps as many slots of each partition; here partitions compete. Slots without a score rank
    before all others, sinks first and then the later ones, but only the last `lag` tokens are protected.

    Args:
        lag: size of a partition in slots, and number of last tokens that are protected.
        sink: first slots that belong to no partition.
    """

    lag: int = Field(default=128, ge=1)
    sink: int = Field(default=16, ge=0)

    @property
    def protects(self) -> int:
        """The last partition stays."""
        return self.lag

    def score(self, layer: LayerContext) -> Importance:
        """Needs no attention; scores lie in (0, 2], those of slots without one above."""
        batch, kv_heads, tokens, _ = layer.keys.shape
        unscored = 2 + torch.arange(1, tokens + 1, device=layer.keys.device, dtype=torch.float32) / tokens
        unscored[: self.sink] = 4
        scores = unscored.repeat(batch, kv_heads, 1)
        partitions = (tokens - self.sink) // self.lag
        if partitions > 1:
            end = self.sink + (partitions - 1) * self.lag
            scores[..., self.sink : end] = self._spread(layer.keys, end) + self._spread(layer.values, end)
        return scores

    def _spread(
        self, states: Float[Tensor, "batch kv_heads tokens channels"], end: int
    ) -> Float[Tensor, "batch kv_heads scored"]:
        """Scores of the slots from the sinks to `end`; one partition more is there to scale by."""
        batch, kv_heads, _, channels = states.shape
        blocks = states[:, :, self.sink : end + self.lag].float().reshape(batch, kv_heads, -1, self.lag, channels)
        low, high = blocks[:, :, 1:].aminmax(dim=3, keepdim=True)
        scaled = (blocks[:, :, :-1] - low) / (high - low).clamp(min=_LEAST_RANGE)
        spread: Tensor = scaled.std(-1)
        return spread.softmax(-1).flatten(2)
