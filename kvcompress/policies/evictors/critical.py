"""A first share of the budget by importance, the rest by what a token adds to the output."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.context import SelectionContext
from kvcompress.policies.evictors.topk import TopK
from kvcompress.policies.registry import EVICTORS


@EVICTORS.register("critical")
class Critical(TopK):
    """Keeps a share of the budget by importance, then what is highest by importance times the projected value's norm.

    Source: CriticalKV (arXiv 2502.03805, algorithm 1: both stages bound the change of a layer's output in L1); its code
    in kvpress for the constants.

    With i the importance, v the value and W a head's part of the output projection: of what the protected leave of the
    budget, floor(first * rest) slots are those of highest i; the others those of highest (i + epsilon) * |W v|_1.

    *Deviates:* kvpress counts the protected among the first stage. With one set for all heads, each stage ranks by the
    mean over heads, of i and of the product. Decode steps go by importance alone. Where the projection's weight
    is missing or not stored as plain numbers, the value's own norm serves.

    Args:
        granularity: "layer", one set of tokens for all heads, or "head", a set per key/value head.
        decode: which slot a decode step frees when a layer is over its budget, as in topk.
        distance: slots (tokens) between the fixed point and the end, as in topk.
        first: share of the budget that goes by importance alone.
        epsilon: added to importance before it is multiplied, in its unit: attention probability, summed over queries
            where the scorer adds it up.
    """

    reads_mass: ClassVar[bool] = True
    reads_value_norms: ClassVar[bool] = True

    first: float = Field(default=0.5, ge=0, le=1)
    epsilon: float = Field(default=1e-4, ge=0, allow_inf_nan=False)

    def preference(
        self, score: Float[Tensor, "batch sets slots"], layer: SelectionContext
    ) -> Int[Tensor, "batch sets slots"]:
        """The protected, then those of the first stage, then by the product; empty ones last."""
        if layer.importance is None or layer.value_norms is None:
            raise ValueError(f"evictor {self.name} needs importance and the norms of values")
        product = (layer.importance + self.epsilon) * layer.value_norms
        if self.granularity == "layer":
            product = product.mean(1, keepdim=True)
        order = super().preference(score, layer)
        protected = layer.protected.sum(-1, keepdim=True)
        rest = layer.budget[:, None, None] - protected
        early = protected + (rest.double() * self.first + 1e-6).floor().long()
        place = torch.arange(order.shape[-1], device=order.device)
        second = torch.where(layer.valid, product, -torch.inf).expand_as(order).gather(-1, order)
        second = torch.where(place < early, torch.inf, second)
        return order.gather(-1, second.argsort(dim=-1, descending=True, stable=True))
