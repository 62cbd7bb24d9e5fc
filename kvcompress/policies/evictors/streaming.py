"""Sinks and recents alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from kvcompress.policies.base import Evictor
from kvcompress.policies.context import SelectionContext
from kvcompress.policies.evictors.preference import keep_first
from kvcompress.policies.registry import EVICTORS


@EVICTORS.register("streaming")
class Streaming(Evictor):
    """Keeps the sinks and, for the rest of the budget, the most recent tokens; needs no scorer.

    Source: StreamingLLM (arXiv 2309.17453, section 3).

    *Deviates:* tokens keep the rotary positions they had, where the paper renumbers positions inside the cache.
    """

    reads_importance: ClassVar[bool] = False

    def select(self, layer: SelectionContext) -> Bool[Tensor, "batch sets slots"]:
        """Ranks by age, latest first, with the protected before all others."""
        latest = torch.iinfo(layer.index.dtype).max
        place = torch.where(layer.valid, torch.where(layer.protected, latest, layer.index), -1)
        return keep_first(place.argsort(dim=-1, descending=True, stable=True), layer.budget)
