"""PyramidKV: wide early layers, narrow late ones."""

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


@ALLOCATORS.register("pyramid")
class Pyramid(Allocator):
    """Layer sizes that fall linearly from the first layer to the last.

    Source: PyramidKV (arXiv 2406.02069, section 4.2).

    Beyond the protected tokens, which every layer keeps, the last of m layers gets 1/beta of the mean, and the first
    as much more than the mean as the last gets less: 2 - 1/beta of it.

    *Deviates:* the paper steps down by a whole number of tokens per layer, which leaves some of the total over; here
    the line is exact and the budgets add up. A layer that a capacity cuts short leaves the rest to the others.

    Args:
        beta: the mean budget divided by that of the last layer, at least 1; 1 makes all layers equal.
    """

    reads_importance: ClassVar[bool] = False

    beta: float = Field(default=20.0, ge=1.0, allow_inf_nan=False)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Apportions what is left above the floors along the line."""
        layers, batch = floor.shape
        last = 1 / self.beta
        line = torch.linspace(2 - last, last, layers, dtype=torch.float64, device=floor.device)
        return apportion_above(floor, line.unsqueeze(1).expand(layers, batch), total, capacity)
