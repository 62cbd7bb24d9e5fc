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
        """Takes the highest level where a layer starts or stops to grow that the total allows, then goes on."""
        levels = torch.cat([floor, capacity]).long()
        spent = torch.minimum(torch.maximum(levels.unsqueeze(1), floor), capacity).sum(1)
        level = torch.where(spent <= total, levels, 0).amax(0)
        budget = torch.minimum(torch.maximum(level, floor), capacity)
        grows = (floor <= level) & (level < capacity)
        growing, rest = grows.sum(0).clamp(min=1), total - budget.sum(0)
        return budget + grows * (rest // growing + (grows.cumsum(0) <= rest % growing))
