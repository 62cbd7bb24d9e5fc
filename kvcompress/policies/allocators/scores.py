"""One ranking of scores over all heads of all layers, as KVzip compares them."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.allocators.heads import as_heads, as_layers
from kvcompress.policies.allocators.ranks import cut, in_order
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, HeadCounts, HeadImportance
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("scores")
class Scores(Allocator):
    """Head sizes by one ranking of the scores of all heads of all layers: the highest stay, wherever they are.

    Source: KVzip (arXiv 2505.23416, section 3.3, its non-uniform head budgets). AdaKV (arXiv 2407.11550) ranks within a
    layer alone.

    Scores are compared as they are, so they must mean the same in every head: the highest attention that a token got
    (`kvzip`) does. A head that looks things up keeps nearly all of its tokens, and one that looks at sinks a few.

    *Deviates:* protected tokens come first in every head.

    Args:
        safeguard: share of the total that all heads get evenly beforehand, from 0 to 1, as in AdaKV.
    """

    by_head: ClassVar[bool] = True

    safeguard: float = Field(default=0.0, ge=0.0, le=1.0)

    def allocate(
        self,
        importance: HeadImportance,
        total: Int[Tensor, " batch"],
        floor: HeadCounts,
        capacity: HeadCounts,
        context: AllocationContext | None = None,
    ) -> HeadCounts:
        """Takes the heads of all layers for layers; cost: a sort of each head, and one of all together."""
        if importance.shape[-1] == 0:
            return capacity.clone()
        context = context or AllocationContext()
        if context.valid is not None:
            importance = importance.masked_fill(~context.valid, -torch.inf)
        if context.protected is not None:
            importance = importance.masked_fill(context.protected, torch.inf)
        least, most = as_layers(floor).long(), as_layers(capacity).long()
        ranked = in_order(as_layers(importance), descending=True).double().neg()
        even = (self.safeguard * total.double() / len(least)).floor().long()
        safe = torch.maximum(least, torch.minimum(most, even))
        safe = torch.where(safe.sum(0) <= total, safe, least)
        budget, _ = cut(ranked, total, safe, safe, most)
        return as_heads(budget, len(floor))
