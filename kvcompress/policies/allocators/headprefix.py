"""PrefixKV's one threshold, over all heads of all layers."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from kvcompress.policies.allocators.heads import as_heads, as_layers
from kvcompress.policies.allocators.prefix import Prefix
from kvcompress.policies.context import AllocationContext, HeadCounts, HeadImportance
from kvcompress.policies.registry import ALLOCATORS


@ALLOCATORS.register("headprefix")
class HeadPrefix(Prefix):
    """Head sizes from one global threshold p: each head keeps its shortest prefix of ranked tokens with mass p.

    Source: PrefixKV (arXiv 2412.03409, section 3.2) for layers; that heads of a layer differ as much as layers do is
    AdaKV's observation (arXiv 2407.11550).

    Every key/value head of every layer ranks its own tokens and normalises its own masses; one threshold over all of
    them decides. So the smallest retained mass of any head, the protected apart, is as large as the total allows. With
    one head per layer it is `prefix`.

    *Deviates:* from the paper as `prefix` does, and by sizing heads: a head whose mass lies on few tokens leaves its
    slots to heads that look at many, in its own layer or in another. Each head keeps its own tokens.

    Args:
        protected: what the protected tokens (the floor of a head) are to its prefix, as in `prefix`.
        even: share of the total that all heads get evenly beforehand, as in `prefix`.
    """

    by_head: ClassVar[bool] = True

    def allocate(
        self,
        importance: HeadImportance,
        total: Int[Tensor, " batch"],
        floor: HeadCounts,
        capacity: HeadCounts,
        context: AllocationContext | None = None,
    ) -> HeadCounts:
        """Takes the heads of all layers for layers; cost: a sort of each head, and one of all together."""
        context = context or AllocationContext()
        valid = None if context.valid is None else as_layers(context.valid)
        units = AllocationContext(valid=valid, notes=context.notes, problems=context.problems)
        budget = self.sizes(as_layers(importance), total, as_layers(floor), as_layers(capacity), units)
        return as_heads(budget, len(floor))
