"""PrefixKV: one global threshold on retained mass decides the size of every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS

_STEPS = 63  # bits of a non-negative float64: after as many halvings the threshold is exact


@ALLOCATORS.register("prefix")
class Prefix(Allocator):
    """Layer sizes from one global threshold p: each layer keeps its shortest prefix of ranked tokens with mass p.

    Source: PrefixKV (arXiv 2412.03409, section 3.2 and algorithm 1).

    Every layer's tokens are ranked by importance and their masses normalised. A rank is kept if the mass ranked before
    it is below p; p is found by binary search so that all layers together keep the total. This maximises the smallest
    retained mass of any layer, the protected apart.

    *Deviates:* the paper stops within a few tokens of the total and rescales. Here the search runs over the 63 bits of
    a float64, so its end is exact, and ranks tied at p are given out by layer, then rank, until the total is met to the
    token. A layer without any mass counts as uniform. The threshold is noted as "threshold" for the report. The
    released code keeps the protected tokens on top of the prefix, as the presets do.

    Args:
        protected: what the protected tokens (the floor of a layer) are to its prefix. "floor", a part of it: a layer
            keeps its prefix, or as many slots as are protected where that is more. "on_top", as in the released code:
            it keeps its prefix and as many slots again as are protected.
    """

    reads_mass: ClassVar[bool] = True

    protected: Literal["floor", "on_top"] = "floor"

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Searches p on the device of `importance`; cost: one sort, then 63 lookups per layer."""
        if importance.shape[-1] == 0:
            return capacity.clone()
        if context is not None and context.valid is not None:
            importance = importance.masked_fill(~context.valid, 0.0)
        before = _mass_before(importance, capacity)

        def kept(threshold_bits: Tensor, right: bool) -> Tensor:
            threshold = threshold_bits.view(torch.float64).expand(before.shape[:2]).unsqueeze(-1).contiguous()
            ranks = torch.searchsorted(before, threshold, right=right).squeeze(-1)
            least = torch.maximum(ranks, floor) if self.protected == "floor" else ranks + floor
            return torch.minimum(least, capacity)

        low = torch.zeros_like(total)  # bits of non-negative floats are ordered as the floats are
        high = torch.full_like(total, torch.iinfo(torch.int64).max)
        for _ in range(_STEPS):
            middle = low + (high - low) // 2
            enough = kept(middle, right=True).sum(0) >= total
            low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
        budget, most = kept(low, right=False), kept(low, right=True)
        tied = most - budget
        rest = total - budget.sum(0) - (tied.cumsum(0) - tied)  # left for a layer once those before it took theirs
        if context is not None:
            context.notes["threshold"] = low.view(torch.float64).clamp(max=1.0)
        return budget + torch.minimum(tied, rest.clamp(min=0))


def _mass_before(importance: Tensor, capacity: Tensor) -> Tensor:
    """Normalised mass ranked before each rank, float64, non-decreasing along tokens."""
    ranked = importance.sort(dim=-1, descending=True).values.double()
    sums = ranked.sum(-1, keepdim=True)
    share = torch.where(sums > 0, ranked / sums.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    before = torch.zeros_like(share)
    torch.cumsum(share[..., :-1], dim=-1, out=before[..., 1:])
    even = torch.arange(importance.shape[-1], device=importance.device, dtype=torch.float64)
    return torch.where(sums > 0, before, even / capacity.clamp(min=1).unsqueeze(-1))
