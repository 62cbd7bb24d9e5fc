"""Budgets for image tokens and for text, each by an allocator of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Int
from pydantic import Field, field_validator
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.registry import ALLOCATORS, AllocatorField


@ALLOCATORS.register("modality")
class Modality(Allocator):
    """Separate budgets for image tokens and text tokens, each split over the layers by its own allocator.

    Source: VL-Cache (arXiv 2410.23317, section 3) finds that the two need different treatment; the split is own.

    Each row's total is divided between the modalities, and each part is allocated as if there were no other tokens:
    its allocator sees the importance, the capacity and the protected tokens of its own modality. The image tokens'
    part is noted as "image_budget", which the evictor keeps. Rows without an image, and sequences of text alone, are
    allocated by `text` alone. Decode steps free slots by the evictor's rule, whatever their modality.

    Args:
        image: allocator of image tokens.
        text: allocator of text tokens.
        image_share: share of the total that goes to image tokens, from 0 to 1; None for as much as they are of the
            tokens there are. What one modality must keep (protected tokens) or cannot fill moves the line.
    """

    splits_modality: ClassVar[bool] = True

    image: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("prefix"))
    text: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("prefix"))
    image_share: float | None = Field(default=None, ge=0.0, le=1.0)

    @field_validator("image", "text")
    @classmethod
    def _not_nested(cls, part: Allocator) -> Allocator:
        if part.splits_modality:
            raise ConfigError(f"allocator modality: {part.name} splits by modality too; nest another allocator")
        return part

    @property
    def reads_mass(self) -> bool:  # type: ignore[override]
        """Whether one of the two does."""
        return self.image.reads_mass or self.text.reads_mass

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What either of the two needs."""
        return tuple(dict.fromkeys(self.image.needs + self.text.needs))

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Divides totals, floors and capacities, and runs each allocator on its part."""
        if context is None or context.is_image is None:
            return self.text.allocate(importance, total, floor, capacity, context)
        slots = torch.arange(importance.shape[-1], device=importance.device)
        valid = context.valid if context.valid is not None else slots < capacity.unsqueeze(-1)
        images = context.is_image & valid
        has, most = _divided(images.sum(-1), floor, capacity, images, context)
        has_text, most_text = floor - has, capacity - most
        if self.image_share is None:
            held = capacity.sum(0).clamp(min=1)
            share = (2 * total * most.sum(0) + held) // (2 * held)  # to the nearest
        else:
            share = (self.image_share * total.double() + 0.5).floor().long()
        least = torch.maximum(has.sum(0), total - most_text.sum(0))
        share = torch.maximum(torch.minimum(share, torch.minimum(most.sum(0), total - has_text.sum(0))), least)
        budget = []
        for name, part, mine, goal, low, high in (
            ("image", self.image, images, share, has, most),
            ("text", self.text, valid & ~images, total - share, has_text, most_text),
        ):
            own = replace(context, valid=mine, is_image=None, notes={})
            budget.append(part.allocate(importance.masked_fill(~mine, 0.0), goal, low, high, own))
            context.notes.update({f"{name}_{note}": value for note, value in own.notes.items()})
        context.notes["image_budget"] = budget[0]
        return budget[0] + budget[1]


def _divided(
    count: Tensor, floor: Tensor, capacity: Tensor, images: Tensor, context: AllocationContext
) -> tuple[Tensor, Tensor]:
    """Floors and capacities of the image tokens; where nobody says which are protected, text is first."""
    most = torch.minimum(count, capacity)
    text = capacity - most
    has = torch.zeros_like(count) if context.protected is None else (context.protected & images).sum(-1)
    return torch.maximum(torch.minimum(has, torch.minimum(most, floor)), floor - text), most
