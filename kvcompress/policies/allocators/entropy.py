"""CAKE: layers whose attention is spread out, and moves, get more."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.allocators.apportionment import apportion, apportion_above, statistic
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("entropy")
class Entropy(Allocator):
    """Layer sizes in proportion to H^(1/tau1) V^(1/tau2), the spread and the shift of a layer's attention.

    Source: CAKE (arXiv 2503.12491, its preference score of a layer).

    H is the entropy of a query's attention, V the variance over queries of the attention that a token receives, added
    up over tokens; both over the last 32 queries ("attention_entropy" and "attention_variance" in
    `kvcompress.policies.statistics`).

    *Deviates:* H and V are means over queries and heads where the paper adds up, which scales all layers alike. All
    layers are allocated at once, where the paper shrinks earlier layers while later ones are prefilled; the budgets in
    the end are the same. What a layer cannot hold goes to the others in proportion, where the released code shares it
    out evenly, and nothing is lost to rounding. Its own eviction score is no part of this.

    Args:
        protected: what the protected tokens (the floor of a layer) are to its share. "floor", a part of it: budgets are
            in proportion, but none is below its floor. "on_top", as in the released code: a layer keeps its window and
            a share of what the windows leave.
        tau1: temperature of the entropy; the larger, the less it matters.
        tau2: temperature of the variance, likewise.
    """

    needs: ClassVar[tuple[str, ...]] = ("attention_entropy", "attention_variance")

    protected: Literal["floor", "on_top"] = "floor"
    tau1: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    tau2: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Apportions the total by preference; equally where no layer has any."""
        spread = statistic(self.name, "attention_entropy", context, like=floor)
        shift = statistic(self.name, "attention_variance", context, like=floor)
        preference = _share(spread, self.tau1) * _share(shift, self.tau2)
        if self.protected == "on_top":
            return apportion_above(floor, preference, total, capacity)
        return apportion(preference, total, floor, capacity)


def _share(values: Tensor, temperature: float) -> Tensor:
    """Values over the largest of their row, so that no power of them overflows, to the power 1 / temperature."""
    highest = values.amax(0, keepdim=True)
    return (values / highest.where(highest > 0, 1.0)).pow(1 / temperature)
