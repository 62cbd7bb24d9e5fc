"""VL-Cache: the less sparse a layer's attention, the larger its budget."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from kvcompress.policies.allocators.apportionment import apportion, statistic
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("sparsity")
class Sparsity(Allocator):
    """Layer sizes in proportion to the share of attention that is not close to zero.

    Source: VL-Cache (arXiv 2410.23317, section 4.1, "sparsity-aware cache budget allocation").

    A layer's sparsity is the share of its attention entries below 1 % of the largest of their row, counted over the
    queries after the image ("attention_sparsity" in `kvcompress.policies.statistics`). Budgets are in proportion to
    1 - sparsity.

    *Deviates:* the paper clips every budget to between 1 % and 100 % of the layer's tokens, after which budgets no
    longer add up. Here floors (protected tokens) and capacities bound them, and the others make up for it. At most the
    last 64 queries are read, where the paper reads all after the image.
    """

    needs: ClassVar[tuple[str, ...]] = ("attention_sparsity",)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Apportions the total by density; equally where every layer is sparse through and through."""
        sparsity = statistic(self.name, "attention_sparsity", context, like=floor)
        return apportion((1 - sparsity).clamp(min=0.0), total, floor, capacity)
