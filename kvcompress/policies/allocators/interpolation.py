"""Retention per layer for any budget, from lists for a few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvcompress.kernels import sent

_APART = 1e-9  # budgets closer than this are one


def interpolate(
    retentions: Sequence[Sequence[float]], budget: Float[Tensor, " batch"]
) -> Float[Tensor, "layers batch"]:
    """Interpolates linearly between lists that each stand for the budget that is their mean over the layers.

    Beyond them it goes towards all 0 at budget 0 and all 1 at budget 1, so the mean over the layers is always the
    budget, and where no layer's retention falls as the budget grows, none does in between.

    Args:
        retentions: share that each layer keeps, from 0 to 1, in any order; of lists with one mean, the first counts.
        budget: fraction that all layers together keep, per row, from 0 to 1.

    Returns:
        float64 shares per layer and row.
    """
    knots = sent(_knots(retentions), budget.device, torch.float64)
    means, budget = knots.mean(1), budget.double()
    above = torch.searchsorted(means, budget, right=True).clamp(1, len(means) - 1)
    low, high = means[above - 1], means[above]
    part = ((budget - low) / (high - low)).clamp(0, 1).unsqueeze(1)
    return torch.lerp(knots[above - 1], knots[above], part).T


def _knots(retentions: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lists in the order of their means, which all differ, from all 0 to all 1."""
    layers = len(retentions[0])
    found = [[0.0] * layers]
    for one in sorted(retentions, key=sum):
        if sum(one) - sum(found[-1]) > _APART * layers and sum(one) < (1 - _APART) * layers:
            found.append(list(one))
    return [*found, [1.0] * layers]
