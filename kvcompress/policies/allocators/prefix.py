"""PrefixKV: one global threshold on retained mass decides the size of every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.allocators.ranks import cut, in_order
from kvcompress.policies.allocators.uniform import Uniform
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("prefix")
class Prefix(Allocator):
    """Layer sizes from one global threshold p: each layer keeps its shortest prefix of ranked tokens with mass p.

    Source: PrefixKV (arXiv 2412.03409, section 3.2 and algorithm 1).

    Every layer's tokens are ranked by importance and their masses normalised. A rank is kept if the mass ranked before
    it is below p, the one p with which all layers together keep the total. This maximises the smallest
    retained mass of any layer, the protected apart.

    *Deviates:* the paper searches p, stops within a few tokens of the total and rescales. Here p is read off the sorted
    masses of all layers, so it is exact, and ranks tied at p are given out by layer, then rank, until the total is met
    to the token. A layer without any mass counts as uniform. The threshold is noted as "threshold" for the report. The
    released code keeps the protected tokens on top of the prefix, as the presets do.

    Args:
        protected: what the protected tokens (the floor of a layer) are to its prefix. "floor", a part of it: a layer
            keeps its prefix, or as many slots as are protected where that is more. "on_top", as in the released code:
            it keeps its prefix and as many slots again as are protected.
        even: share of the total that layers get evenly beforehand, from 0, the paper's, to 1, which is `uniform`; the
            prefixes of the rest come on top.
    """

    reads_mass: ClassVar[bool] = True

    protected: Literal["floor", "on_top"] = "floor"
    even: float = Field(default=0.0, ge=0.0, le=1.0)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Finds p on the device of `importance`; cost: a sort of each layer, and one of all together."""
        return self.sizes(importance, total, floor, capacity, context)

    def sizes(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None,
    ) -> TokenCounts:
        """What `allocate` gives, of checked arguments, for whatever stands in the place of layers."""
        if importance.shape[-1] == 0:
            return capacity.clone()
        if context is not None and context.valid is not None:
            importance = importance.masked_fill(~context.valid, 0.0)
        before = _mass_before(importance, capacity)
        least = floor
        if self.even:
            share = (self.even * total.double()).floor().long()
            own = AllocationContext(problems=None if context is None else context.problems)
            least = Uniform().allocate(importance, share, floor, capacity, own)
        # Ranks that the protected do not stand for already: those beyond them, or all from the first on.
        begin = floor if self.protected == "floor" else torch.zeros_like(floor)
        budget, threshold = cut(before, total, least, begin, begin + capacity - least)
        if context is not None:
            context.notes["threshold"] = torch.where(threshold < torch.inf, threshold, 0.0).clamp(max=1.0)
        return budget


def _mass_before(importance: Tensor, capacity: Tensor) -> Tensor:
    """Normalised mass ranked before each rank, float64, non-decreasing along tokens."""
    ranked = in_order(importance, descending=True).double()
    sums = ranked.sum(-1, keepdim=True)
    share = torch.where(sums > 0, ranked / sums.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    before = torch.zeros_like(share)
    torch.cumsum(share[..., :-1], dim=-1, out=before[..., 1:])
    even = torch.arange(importance.shape[-1], device=importance.device, dtype=torch.float64)
    return torch.where(sums > 0, before, even / capacity.clamp(min=1).unsqueeze(-1))
