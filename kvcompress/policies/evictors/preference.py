"""From an order of preference to the slots that stay."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def keep_first(
    order: Int[Tensor, "batch sets slots"], budget: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch sets slots"]:
    """Marks slots in the order given until the budget is spent.

    Args:
        order: slots, the protected first, then those most worth keeping; empty ones last.
        budget: slots that stay, per row.
    """
    wanted = (torch.arange(order.shape[-1], device=order.device) < budget[:, None, None]).expand_as(order)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)
