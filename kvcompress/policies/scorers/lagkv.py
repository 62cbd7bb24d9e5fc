"""LagKV: how far keys and values spread, measured by the tokens that come next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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

    After the sinks, tokens in their order form partitions of `lag`. A partition is scaled by the minimum and maximum of
    each channel in the next one; a token's score is the standard deviation over the scaled channels as a softmax within
    its partition, of its key plus of its value. Sinks, the last whole partition and what follows it have no score of
    their own.

    *Deviates:* the paper keeps as many tokens of each partition; here partitions compete. Tokens without a score rank
    before all others, sinks first and then the later ones, but only the last `lag` tokens are protected.

    Args:
        lag: size of a partition in tokens, and number of last tokens that are protected.
        sink: first tokens that belong to no partition.
    """

    lag: int = Field(default=128, ge=1)
    sink: int = Field(default=16, ge=0)

    @property
    def protects(self) -> int:
        """The last partition stays."""
        return self.lag

    def score(self, layer: LayerContext) -> Importance:
        """Needs no attention; scores lie in (0, 2], those of slots without one above."""
        tokens, shape = layer.keys.shape[2], layer.keys.shape[:3]
        rank = torch.arange(tokens, device=layer.keys.device)  # of a token in its row
        count = tokens if layer.valid is None else layer.held.clamp(min=1)
        by_rank = torch.where(rank < self.sink, 4.0, 2 + (rank + 1).float() / count)
        slots, ranks = _slots_and_ranks(layer, tokens - count)
        partitions = (tokens - self.sink) // self.lag
        if partitions > 1:
            end = self.sink + (partitions - 1) * self.lag
            spread = self._spread(layer.keys, slots, end) + self._spread(layer.values, slots, end)
            scored = (rank >= self.sink) & (rank < self.sink + ((count - self.sink) // self.lag - 1) * self.lag)
            by_rank = torch.where(scored, F.pad(spread, (self.sink, tokens - end)), by_rank)
        return by_rank.expand(shape) if ranks is None else by_rank.expand(shape).gather(-1, ranks.expand(shape))

    def _spread(
        self,
        states: Float[Tensor, "batch kv_heads tokens channels"],
        slots: Int[Tensor, "batch sets tokens"] | None,
        end: int,
    ) -> Float[Tensor, "batch kv_heads scored"]:
        """Scores of the tokens from the sinks to `end`; one partition more is there to scale by."""
        batch, kv_heads, _, channels = states.shape
        wanted = slice(self.sink, end + self.lag)
        if slots is None:
            states = states[:, :, wanted]
        else:
            rows, heads = (torch.arange(count, device=states.device) for count in (batch, kv_heads))
            states = states[rows[:, None, None], heads[:, None], slots[..., wanted]]
        blocks = states.float().reshape(batch, kv_heads, -1, self.lag, channels)
        low, high = blocks[:, :, 1:].aminmax(dim=3, keepdim=True)
        scaled = (blocks[:, :, :-1] - low) / (high - low).clamp(min=_LEAST_RANGE)
        spread: Tensor = scaled.std(-1)
        return spread.softmax(-1).flatten(2)


def _slots_and_ranks(layer: LayerContext, empty: Tensor | int) -> tuple[Tensor | None, Tensor | None]:
    """The slot of each token of a row, and the number of tokens before each slot's; None where the two are the same.

    Args:
        layer: the slots.
        empty: slots of each row without a token, `[batch, 1, 1]`.
    """
    order = layer.in_order()
    if order is None and layer.valid is None:
        return None, None
    last = layer.keys.shape[2] - 1
    place = torch.arange(last + 1, device=layer.keys.device)
    slots, ranks = (place + empty).clamp(max=last), place - empty
    if order is None:
        return slots, ranks.clamp(min=0)
    ranks = torch.empty_like(order).scatter_(-1, order, place.expand(order.shape)) - empty
    return order.gather(-1, slots.expand(order.shape)), ranks.clamp(min=0)
