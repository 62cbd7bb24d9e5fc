"""How unequally importance is spread over tokens: Lorenz curve and Gini coefficient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gini(importance: Float[Tensor, "rows tokens"]) -> float:
    """Mean over rows of the Gini coefficient: 0 where all tokens are alike, towards 1 where few have all of it.

    Args:
        importance: non-negative, of any scale; a row without any counts as one whose tokens are alike.
    """
    ordered = importance.sort(dim=-1).values.double()
    count = ordered.shape[-1]
    rank = torch.arange(1, count + 1, device=ordered.device, dtype=torch.float64)
    total = ordered.sum(-1)
    share = torch.where(total > 0, (ordered * rank).sum(-1) / total.clamp(min=_SMALLEST), (count + 1) / 2)
    return (2 * share / count - (count + 1) / count).mean().item()


def lorenz_curve(importance: Float[Tensor, " tokens"]) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Share of the tokens, least important first, and the share of all importance that they have together.

    Args:
        importance: non-negative, of any scale; without any at all the curve is the line of equality.

    Returns:
        Both shares from 0 to 1, float64, one point more than tokens.
    """
    ordered = importance.double().sort().values
    tokens = torch.linspace(0, 1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    if not ordered.sum() > 0:
        return tokens, tokens
    return tokens, torch.cat([ordered.new_zeros(1), ordered.cumsum(0) / ordered.sum()])


_SMALLEST = torch.finfo(torch.float64).tiny
