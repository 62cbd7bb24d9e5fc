"""The same number of slots in every layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("uniform")
class Uniform(Allocator):
    """The same number of slots in every layer, the baseline of every adaptive method.

    Source: H2O (arXiv 2306.14048) and StreamingLLM (arXiv 2309.17453) give all layers one size.

    Floors and capacities that a layer cannot leave are made up for by the others; what does not divide evenly goes to
    the first layers.
    """

    reads_importance: ClassVar[bool] = False

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Finds the water level that spends the total, by binary search."""
        low, high = torch.zeros_like(total), total  # the highest level that does not overspend lies in [low, high]
        for _ in range(32):
            middle = (low + high + 1) // 2
            spent = torch.minimum(torch.maximum(middle.expand_as(floor), floor), capacity).sum(0)
            low, high = torch.where(spent <= total, middle, low), torch.where(spent <= total, high, middle - 1)
            high = torch.maximum(low, high)
        budget = torch.minimum(torch.maximum(low.expand_as(floor), floor), capacity)
        can_grow = (budget <= low) & (budget < capacity)
        rest = total - budget.sum(0)
        return budget + (can_grow & (can_grow.cumsum(0) <= rest)).long()
