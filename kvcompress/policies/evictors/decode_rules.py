"""Which slot of a layer is freed after a decode step."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.shapes import DecodeContext


def oldest_slot(layer: DecodeContext) -> Int[Tensor, "batch sets"]:
    """The slot of the earliest token that is not pinned."""
    latest = torch.iinfo(layer.columns.dtype).max
    return layer.columns.masked_fill(layer.columns < layer.pinned_before, latest).argmin(-1)


def lowest_score_slot(layer: DecodeContext) -> Int[Tensor, "batch sets"]:
    """The unprotected slot of the lowest score; the oldest one where no unprotected slot has a score yet."""
    if layer.importance is None:
        return oldest_slot(layer)
    columns = layer.columns
    free = (columns >= layer.pinned_before) & (columns < layer.recent_from)
    score = layer.importance.mean(1, keepdim=True) if columns.shape[1] == 1 else layer.importance
    scored = free & ~score.isnan()
    lowest = torch.where(scored, score, torch.inf).argmin(-1)
    return torch.where(scored.any(-1), lowest, oldest_slot(layer))
