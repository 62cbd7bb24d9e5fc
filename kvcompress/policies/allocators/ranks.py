"""Budgets from one cut through the ranks of several units: layers, or heads."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.policies.context import TokenCounts


def cut(
    order: Float[Tensor, "units batch ranks"],
    total: Int[Tensor, " batch"],
    floor: TokenCounts,
    begin: TokenCounts,
    end: TokenCounts,
) -> tuple[TokenCounts, Float[Tensor, " batch"]]:
    """Gives every unit its floor, and the first ranks of all units together until the total is met.

    Args:
        order: what ranks are taken by, lowest first; must not fall along a unit's ranks. Ties go to earlier units, then
            to earlier ranks.
        total: slots per row over all units, at least the floors.
        floor: slots that every unit gets in any case.
        begin: first rank of each unit that the floor does not give already.
        end: first rank that a unit cannot have.

    Returns:
        int64 slots per unit and row, and the entry of the last rank taken; infinite where none had to be.
    """
    ranks = torch.arange(order.shape[-1], device=order.device)
    loose = (ranks >= begin.unsqueeze(-1)) & (ranks < end.unsqueeze(-1))
    order, wanted = torch.where(loose, order, torch.inf), total - floor.sum(0)
    every = in_order(order.transpose(0, 1).flatten(1))  # a row's ranks of all units
    threshold = every.gather(-1, (wanted - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    below = (order < threshold[:, None]).sum(-1)
    tied = ((order == threshold[:, None]) & loose).sum(-1)
    rest = wanted - below.sum(0) - (tied.cumsum(0) - tied)  # left for a unit once those before it took theirs
    budget = floor + torch.where(wanted > 0, below + torch.minimum(tied, rest.clamp(min=0)), 0)
    return budget, torch.where(wanted > 0, threshold, torch.inf)


def in_order(values: Float[Tensor, "*rows ranks"], descending: bool = False) -> Float[Tensor, "*rows ranks"]:
    """Numbers of every row from the lowest to the highest, or the other way."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.sort(dim=-1, descending=descending).values
    values = -values if descending else values  # numpy sorts several times as fast as torch, but one way alone
    found = torch.from_numpy(np.sort(values.detach().numpy(), axis=-1))
    return found.neg_() if descending else found
