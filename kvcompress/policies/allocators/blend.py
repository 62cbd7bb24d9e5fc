"""A part of the budget by one allocator, the rest by another."""

from __future__ import annotations

import torch
from jaxtyping import Int
from pydantic import Field, field_validator
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS, AllocatorField


@ALLOCATORS.register("blend")
class Blend(Allocator):
    """One allocator's layer sizes for a share of the budget, and another's for the rest, added up.

    Source: own; with the defaults, a layer of PrefixKV (arXiv 2412.03409) cannot fall below 80 % of a uniform one.

    The first allocator gets its share, at least the floors, which it meets; the second gets the rest, without floors
    and up to what the first left of each layer.

    Args:
        share: share of the total that the first allocator splits, from 0 to 1.
        first: allocator of the share.
        second: allocator of the rest.
    """

    share: float = Field(default=0.8, ge=0.0, le=1.0)
    first: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("uniform"))
    second: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("prefix"))

    @field_validator("first", "second")
    @classmethod
    def _no_modality(cls, part: Allocator) -> Allocator:
        if part.splits_modality:
            raise ConfigError(f"allocator blend: {part.name} splits by modality, so it can only be the outermost one")
        return part

    @property
    def reads_importance(self) -> bool:  # type: ignore[override]
        """Whether one of the two does."""
        return self.first.reads_importance or self.second.reads_importance

    @property
    def reads_mass(self) -> bool:  # type: ignore[override]
        """Whether one of the two does."""
        return self.first.reads_mass or self.second.reads_mass

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What either of the two needs."""
        return tuple(dict.fromkeys(self.first.needs + self.second.needs))

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Runs the two one after the other."""
        share = (self.share * total.double() + 0.5).floor().long()
        share = torch.minimum(torch.maximum(share, floor.sum(0)), total)
        budget = self.first.allocate(importance, share, floor, capacity, context)
        left = capacity - budget
        return budget + self.second.allocate(importance, total - share, torch.zeros_like(left), left, context)
