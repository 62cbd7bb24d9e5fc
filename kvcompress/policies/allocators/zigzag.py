"""ZigZagKV: layers that need more tokens to hold most of their attention get more."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.allocators.apportionment import apportion_above
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("zigzag")
class ZigZag(Allocator):
    """Layer sizes in proportion to the tokens that hold most of a layer's attention, above a common base.

    Source: ZigZagKV (arXiv 2412.09036, section 4, equation 6).

    A layer's need is the smallest number of its tokens that together hold the share `mass` of its attention. Every
    layer gets the same base, and the rest of the total in proportion to its need.

    *Deviates:* the paper counts the need per head and averages; here it is counted on the head-mean importance, over
    the queries that the scorer reads. A layer without any mass counts as uniform. The paper does not fix the base.

    Args:
        mass: share of a layer's attention that its need holds, in (0, 1].
        base: what every layer gets in any case, as a share of the mean budget, from 0 (need decides alone) to 1
            (uniform).
    """

    reads_mass: ClassVar[bool] = True

    mass: float = Field(default=0.9, gt=0.0, le=1.0)
    base: float = Field(default=0.5, ge=0.0, le=1.0)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Counts needs, then apportions what is left above base and floors."""
        if context is not None and context.valid is not None:
            importance = importance.masked_fill(~context.valid, 0.0)
        base = (self.base * total.double() / len(floor)).floor().long().expand_as(floor)
        least = torch.minimum(torch.maximum(base, floor), capacity)
        least = torch.where(least.sum(0) <= total, least, floor)  # floors that leave no room for a base
        return apportion_above(least, self._need(importance, capacity), total, capacity)

    def _need(self, importance: Tensor, capacity: Tensor) -> Tensor:
        """Number of highest tokens whose mass reaches the share, float64 `[layers, batch]`."""
        if importance.shape[-1] == 0:
            return capacity.double()
        held = importance.double().sort(dim=-1, descending=True).values.cumsum(-1)
        whole = held[..., -1:]
        need = (held < self.mass * whole).sum(-1) + 1
        return torch.where(whole.squeeze(-1) > 0, need.double(), self.mass * capacity.double())
