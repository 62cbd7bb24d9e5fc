"""From an order of preference to the slots that stay: each modality its number."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.policies.context import SelectionContext


def keep_first(
    order: Int[Tensor, "batch sets slots"], layer: SelectionContext, evictor: str
) -> Bool[Tensor, "batch sets slots"]:
    """Marks slots in the order given until the budget is spent.

    Where there is an image budget, image slots are marked until it is spent and text slots until the rest is. Heads
    whose image or text slots do not suffice (after decode steps, heads that hold different tokens may have lost
    different ones) make up for it with the other kind. More protected slots of a kind than its budget has are a problem
    that is noted in the context.

    Args:
        order: slots, the protected first, then those most worth keeping; empty ones last.
        layer: budgets, and which slots are valid, protected and of images.
        evictor: its name, for errors.
    """
    budget = layer.budget[:, None, None]
    if layer.image_budget is None or layer.is_image is None:
        wanted = (torch.arange(order.shape[-1], device=order.device) < budget).expand_as(order)
        return torch.zeros_like(wanted).scatter_(-1, order, wanted)
    images, texts = layer.is_image & layer.valid, layer.valid & ~layer.is_image
    count = images.sum(-1, keepdim=True)
    least = budget - texts.sum(-1, keepdim=True)
    image_budget = torch.minimum(torch.maximum(layer.image_budget[:, None, None], least), count)
    wanted = torch.zeros_like(order, dtype=torch.bool)
    for kind, slots, quota in (("image", images, image_budget), ("text", texts, budget - image_budget)):
        too_many = ((layer.protected & slots).sum(-1, keepdim=True) > quota).any()
        layer.problems.note(
            f"evictor {evictor}: more {kind} slots are protected than the allocator gave {kind} tokens; its floors "
            "must count the protected of each modality",
            too_many,
        )
        ordered = slots.expand_as(order).gather(-1, order)
        wanted |= ordered & (ordered.cumsum(-1) <= quota)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)
