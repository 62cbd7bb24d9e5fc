"""Recency: the later, the better."""

from __future__ import annotations

from typing import ClassVar

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("position")
class Position(Scorer):
    """Number of tokens before the slot's token: with sinks, a sliding window as any evictor of scores keeps it.

    Source: StreamingLLM (arXiv 2309.17453); a baseline for other scorers.
    """

    independent: ClassVar[bool] = True

    def score(self, layer: LayerContext) -> Importance:
        """The same for every key/value head."""
        return layer.index.float().expand(layer.keys.shape[:3])
