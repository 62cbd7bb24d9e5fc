"""AdaKV: the heads of a layer share what the layer gets, by their scores."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Int
from pydantic import Field, field_validator
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.policies.allocators.apportionment import apportion
from kvcompress.policies.allocators.ranks import cut, in_order
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, HeadCounts, HeadImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS, AllocatorField


@ALLOCATORS.register("adakv")
class AdaKV(Allocator):
    """Head sizes within a layer by one ranking of the tokens of all its heads; layers by an allocator of their own.

    Source: AdaKV (arXiv 2407.11550, algorithm 1 and its safeguard).

    What a layer gets goes to the highest scores of any of its key/value heads, so a head whose scores are spread over
    many tokens keeps more than one that looks at few. A share of the layer's slots is given out evenly before, to the
    highest scores of each head.

    *Deviates:* the paper has all layers of one size; `layers` may be any allocator of layers, which sees the mean over
    heads of the importance of each rank. Protected tokens come first in every head.

    Args:
        safeguard: share of a layer's slots that its heads get evenly, from 0 to 1; the released code's 0.2.
        layers: allocator that sizes the layers.
    """

    by_head: ClassVar[bool] = True

    safeguard: float = Field(default=0.2, ge=0.0, le=1.0)
    layers: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("uniform"))

    @field_validator("layers")
    @classmethod
    def _of_layers(cls, part: Allocator) -> Allocator:
        if part.by_head:
            raise ConfigError(f"allocator adakv: layers: {part.name} sizes heads itself; choose one of layers alone")
        return part

    @property
    def reads_mass(self) -> bool:  # type: ignore[override]
        """Whether the allocator of the layers does."""
        return self.layers.reads_mass

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the allocator of the layers needs."""
        return self.layers.needs

    def allocate(
        self,
        importance: HeadImportance,
        total: Int[Tensor, " batch"],
        floor: HeadCounts,
        capacity: HeadCounts,
        context: AllocationContext | None = None,
    ) -> HeadCounts:
        """Sizes layers, then heads; cost: a sort of each head, and one of each layer."""
        layers, batch, heads, tokens = importance.shape
        if tokens == 0:
            return capacity.clone()
        floor, capacity, context = floor.long(), capacity.long(), context or AllocationContext()
        if context.valid is not None:
            importance = importance.masked_fill(~context.valid, -torch.inf)
        of_layer = self._layers(importance, total, floor, capacity, context)
        if context.protected is not None:
            importance = importance.masked_fill(context.protected, torch.inf)
        ranked = in_order(importance, descending=True).neg()
        # A layer of a row as a row, its heads as layers: [heads, layers * batch].
        by_head = (t.permute(2, 0, 1, *range(3, t.ndim)).flatten(1, 2) for t in (ranked, floor, capacity))
        order, least, most = by_head
        even = (self.safeguard * of_layer.flatten().double() / heads).floor().long()
        safe = torch.maximum(least, torch.minimum(most, even))
        safe = torch.where(safe.sum(0) <= of_layer.flatten(), safe, least)  # floors may leave too little for it
        budget, _ = cut(order.double(), of_layer.flatten(), safe, safe, most)
        return budget.view(heads, layers, batch).permute(1, 2, 0).contiguous()

    def _layers(
        self, importance: Tensor, total: Tensor, floor: Tensor, capacity: Tensor, context: AllocationContext
    ) -> TokenCounts:
        """Slots of each layer and row over its heads."""
        heads, least, most = importance.shape[2], floor.sum(2), capacity.sum(2)
        ranks = in_order(importance.masked_fill(importance == -torch.inf, 0.0), descending=True)
        low, high = -(-least // heads), most // heads
        own = replace(context, valid=None, protected=None, notes={})
        of_one = self.layers.allocate(
            ranks.double().mean(2).float(), total // heads, torch.minimum(low, high), high, own
        )
        context.notes.update(own.notes)
        return apportion(of_one.double(), total, least, most)
