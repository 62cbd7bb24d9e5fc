"""Sinks and recents alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from kvcompress.registry import EVICTORS
from kvcompress.shapes import SelectionContext
from kvcompress.stages import Evictor


@EVICTORS.register("streaming")
class Streaming(Evictor):
    """Keeps the sinks and, for the rest of the budget, the most recent tokens; needs no scorer.

    Source: StreamingLLM (arXiv 2309.17453, section 3).

    *Deviates:* tokens keep the rotary positions they had, where the paper renumbers positions inside the cache.
    """

    reads_importance: ClassVar[bool] = False

    def select(self, layer: SelectionContext) -> Bool[Tensor, "batch sets slots"]:
        """Ranks by column, latest first, with the protected before all others."""
        latest = torch.iinfo(layer.columns.dtype).max
        rank_by = layer.columns.masked_fill(layer.protected, latest).masked_fill(~layer.valid, -1)
        order = rank_by.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(rank_by.shape[-1], device=rank_by.device)
        wanted = (ranks < layer.budget[:, None, None]).expand_as(order)
        return torch.zeros_like(rank_by, dtype=torch.bool).scatter_(-1, order, wanted)
