"""The slots of highest importance stay."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Evictor
from kvcompress.policies.context import DecodeContext, SelectionContext
from kvcompress.policies.evictors.preference import keep_first
from kvcompress.policies.registry import EVICTORS

_DISTANCE = 25  # of the released code
_MOST_TOKENS = 2.0**23  # of which float32 can tell one from the next
_BEYOND = 2.0**104  # scores stay below the product of the two


class ByScore(Evictor):
    """What evictors share that keep the slots of highest importance, in one set for all heads or in a set for each."""

    granularity: Literal["layer", "head"] = "layer"

    @property
    def by_head(self) -> bool:
        """As the granularity says."""
        return self.granularity == "head"

    def select(self, layer: SelectionContext) -> Bool[Tensor, "batch sets slots"]:
        """Ranks by importance, with the protected first."""
        if layer.importance is None:
            raise ValueError(f"evictor {self.name} needs importance: choose a scorer")
        score = layer.importance
        if self.granularity == "layer":
            score = score.mean(1, keepdim=True)
        sets = max(score.shape[1], layer.valid.shape[1])
        return keep_first(self.preference(score.expand(-1, sets, -1), layer), layer.budget)

    def preference(
        self, score: Float[Tensor, "batch sets slots"], layer: SelectionContext
    ) -> Int[Tensor, "batch sets slots"]:
        """Slots in the order in which they are kept: the protected first, empty ones last."""
        score = torch.where(layer.valid, score.masked_fill(layer.protected, torch.inf), -torch.inf)
        return score.argsort(dim=-1, descending=True, stable=True)


@EVICTORS.register("topk")
class TopK(ByScore):
    """Keeps the slots of highest importance, sinks and recents among them.

    Source: PrefixKV (arXiv 2412.03409, section 3.1 and its released code for `fixed_point`); H2O (arXiv 2306.14048) for
    `lowest_score`.

    Ties go to the slot that comes first, which is the earlier token unless decode steps have reused slots.

    Args:
        granularity: "layer", one set of tokens for all heads, ranked by head-mean importance; or "head", a set per
            key/value head, ranked by its own.
        decode: which slot a decode step frees when a layer is over its budget. "fixed_point": the one `distance` slots
            before the end of what a scoring forward kept (the middle if fewer are kept), so that earlier ones stay
            for good and the rest leave by age; "oldest": the oldest after the sinks; "lowest_score": the lowest score
            of the last scoring forward, where tokens without a score are safe until they have one; "none": the layer
            grows.
        distance: slots (tokens) between the fixed point and the end; None for the released code's 25, or as many as
            are protected as recents where that is more.
    """

    granularity: Literal["layer", "head"] = "layer"
    decode: Literal["fixed_point", "oldest", "lowest_score", "none"] = "fixed_point"
    distance: int | None = Field(default=None, ge=1)

    @property
    def frees(self) -> Literal["oldest", "chosen", "nothing"]:
        """Two of the rules go by age, with different tokens pinned."""
        if self.decode == "none":
            return "nothing"
        return "chosen" if self.decode == "lowest_score" else "oldest"

    @property
    def reach(self) -> int | None:
        """A given fixed point evicts by age from `distance` slots before the end on, whatever is protected."""
        return self.distance if self.decode == "fixed_point" else None

    def pinned(self, kept: Int[Tensor, " batch"], sinks: Int[Tensor, " batch"], recents: int) -> Int[Tensor, " batch"]:
        """Everything before the fixed point, or the sinks."""
        if self.decode != "fixed_point":
            return sinks
        distance = self.distance or max(_DISTANCE, recents)
        middle = torch.minimum(kept // 2, (kept - recents).clamp(min=0))
        return torch.where(kept > distance, kept - distance, middle)

    def victim(self, layer: DecodeContext) -> Int[Tensor, "batch sets"]:
        """The unprotected slot of the lowest score; the oldest one where none has a score yet."""
        if layer.importance is None:
            raise ValueError(f"evictor {self.name} needs importance: choose a scorer")
        score = layer.importance
        if self.granularity == "layer":
            score = score.mean(1, keepdim=True)
        age = (layer.index.float() + _MOST_TOKENS) * _BEYOND  # exact, so that one search finds the oldest as well
        score = torch.where(score.isnan(), age, score)
        return score.masked_fill(layer.protected | (layer.index < 0), torch.inf).argmin(-1)
