"""From an order of preference to the slots that stay: the protected first, and each modality its number."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.errors import PolicyError
from kvcompress.policies.context import SelectionContext


def keep_first(
    order: Int[Tensor, "batch sets slots"], layer: SelectionContext, evictor: str
) -> Bool[Tensor, "batch sets slots"]:
    """Marks slots in the order given until the budget is spent, the protected before all others.

    Where there is an image budget, image slots are marked until it is spent and text slots until the rest is, the
    protected of each first. Heads whose image or text slots do not suffice (after decode steps, heads that hold
    different tokens may have lost different ones) make up for it with the other kind.

    Args:
        order: slots, the one most worth keeping first; where empty ones stand does not matter.
        layer: budgets, and which slots are valid, protected and of images.
        evictor: its name, for errors.

    Raises:
        PolicyError: if more slots of a kind are protected than its budget has.
    """
    valid, protected = layer.valid.expand_as(order), (layer.protected & layer.valid).expand_as(order)
    last = (~valid).long() * 2 - protected.long()
    order = order.gather(-1, last.gather(-1, order).argsort(dim=-1, stable=True))
    budget = layer.budget.long()[:, None, None]
    if layer.image_budget is None or layer.is_image is None:
        ranks = torch.arange(order.shape[-1], device=order.device)
        wanted = (ranks < budget).expand_as(order)
    else:
        images = (layer.is_image & layer.valid).expand_as(order)
        count = images.sum(-1, keepdim=True)
        least = budget - (valid.sum(-1, keepdim=True) - count)
        image_budget = torch.minimum(torch.maximum(layer.image_budget.long()[:, None, None], least), count)
        _check_room(evictor, protected & images, image_budget, "image")
        _check_room(evictor, protected & ~images, budget - image_budget, "text")
        is_image, is_valid = images.gather(-1, order), valid.gather(-1, order)
        is_text = is_valid & ~is_image
        wanted = (is_image & (is_image.cumsum(-1) <= image_budget)) | (
            is_text & (is_text.cumsum(-1) <= budget - image_budget)
        )
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


def _check_room(evictor: str, protected: Tensor, budget: Tensor, kind: str) -> None:
    needed = protected.sum(-1, keepdim=True)
    if (needed > budget).any():
        row, head, _ = (needed > budget).nonzero()[0].tolist()
        raise PolicyError(
            f"evictor {evictor}: row {row}: {int(needed[row, head])} {kind} slots are protected, but the allocator "
            f"gave {kind} tokens {int(budget[row, head])}; its floors must count the protected of each modality"
        )
