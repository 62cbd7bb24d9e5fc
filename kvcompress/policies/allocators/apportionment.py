"""Whole numbers of slots in proportion to a weight per layer, within floors and capacities, exact to the slot."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.errors import PolicyError
from kvcompress.policies.context import AllocationContext, TokenCounts

_LEAST = 2.0**-40  # layers of no weight count as this part of the largest: they fill up once all others are full
_SAME = 2.0**30  # remainders that differ by less than one in so many are the same


def apportion(
    weight: Float[Tensor, "layers batch"], total: Int[Tensor, " batch"], floor: TokenCounts, capacity: TokenCounts
) -> TokenCounts:
    """Gives every layer its weight times one common multiplier, within its floor and capacity, in whole slots.

    The multiplier of each row is the one with which these quotas add up to the total (water-filling): they grow in a
    straight line between the multipliers at which a layer reaches its floor or capacity. What is left once
    they are rounded down goes to the largest remainders, ties to earlier layers, so that no layer is a slot or more off
    its quota, and a larger weight takes nothing from its own layer.

    Args:
        weight: not negative; only their proportions matter. Layers of no weight share evenly what the others cannot
            take.
        total: slots per row, within the sums of floors and capacities.
        floor: least slots per layer and row.
        capacity: most slots per layer and row.

    Returns:
        int64 slots per layer and row that add up to the total.
    """
    weight, floor, capacity = weight.double(), floor.long(), capacity.long()
    highest = weight.amax(0)
    scaled = torch.where(highest > 0, weight / highest, 1.0).clamp(min=_LEAST)
    starts, stops = floor / scaled, capacity / scaled  # multipliers between which a layer's quota grows
    steps = torch.cat([starts, stops])
    # Running sums, since they add up each row in the same order whatever the batch.
    spent = torch.minimum(torch.maximum(scaled * steps.unsqueeze(1), floor), capacity).cumsum(1)[:, -1]
    step = torch.where(spent <= total, steps, 0.0).amax(0)  # the highest of them that the total allows
    grows = (starts <= step) & (step < stops)
    still = torch.where(starts > step, floor, capacity).masked_fill(grows, 0).sum(0)
    growth = (scaled * grows).cumsum(0)[-1]
    multiplier = torch.where(growth > 0, (total - still) / growth, step)
    quota = torch.minimum(torch.maximum(scaled * multiplier, floor), capacity)
    budget = quota.floor().long()
    remainder = ((quota - budget) * _SAME).round()  # in steps far above rounding, so that equal ones tie
    rank = remainder.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return budget + (rank < total - budget.sum(0)).long()


def apportion_above(
    floor: TokenCounts,
    weight: Float[Tensor, "layers batch"],
    total: Int[Tensor, " batch"],
    capacity: TokenCounts,
) -> TokenCounts:
    """Gives every layer its floor, and apportions the rest of the total on top of it."""
    floor = floor.long()
    return floor + apportion(weight, total - floor.sum(0), torch.zeros_like(floor), capacity - floor)


def statistic(allocator: str, name: str, context: AllocationContext | None, like: TokenCounts) -> Tensor:
    """A statistic that an allocator reads, float64 `[layers, batch]`.

    Raises:
        PolicyError: if it is missing or misshapen. That it is negative or not finite is noted as a problem of the
            context; the message names the layer.
    """
    known = {} if context is None else context.statistics
    if name not in known:
        raise PolicyError(
            f"allocator {allocator}: reads the statistic '{name}', which a cache computes; in a direct call pass "
            f"context=AllocationContext(statistics={{'{name}': ...}}) of the shape {tuple(like.shape)}"
        )
    found = known[name].double()
    if found.shape != like.shape:
        raise PolicyError(
            f"allocator {allocator}: the statistic '{name}' must be [layers, batch] = {tuple(like.shape)}, got "
            f"{tuple(found.shape)}"
        )
    wrong = ~((found >= 0) & (found < torch.inf))

    def numbers() -> str:
        layer = int(wrong.any(1).nonzero()[0])
        return f"allocator {allocator}: layer {layer}: the statistic '{name}' must be finite and not negative"

    if context is not None and context.problems is not None:
        context.problems.note(numbers, wrong.any())
    return found
