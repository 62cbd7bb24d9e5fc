"""SnapKV: what the last queries of the prompt look at, smoothed along positions."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("snapkv")
class SnapKV(Scorer):
    """Mean attention of the last queries, pooled along positions; the tokens of these queries are kept.

    Source: SnapKV (arXiv 2404.14469, section 4 and listing 1).

    *Deviates:* the query heads of a group are averaged before pooling, since they share a key/value head. After an
    eviction, neighbours are the tokens that are left. Every later turn votes anew, with as many queries as it has, and
    its scores replace earlier ones.

    Args:
        window: number of last queries (tokens) that vote, and of last tokens that are protected.
        kernel: width of the pooling in slots, odd; 1 for none.
        pool: "avg", where slots beyond the end count as zero, or "max".
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    window: int = Field(default=32, ge=1)
    kernel: int = Field(default=5, ge=1)
    pool: Literal["avg", "max"] = "avg"

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"must be odd, so that a slot is in the middle of its neighbours; got {kernel}")
        return kernel

    @property
    def protects(self) -> int:
        """The window stays."""
        return self.window

    def score(self, layer: LayerContext) -> Importance:
        """Pools the mean over the window for all slots before it; those in it have their own mean."""
        queries, before = layer.query.shape[2], layer.keys.shape[2] - self.window
        mass = layer.attention_mass(first=max(0, queries - self.window))
        if layer.valid is None:
            mean = mass / min(queries, self.window)
        else:
            mean = mass / layer.row_queries.clamp(1, self.window)[:, None, None]
        if before <= 0 or self.kernel == 1:
            return mean
        order = layer.in_order()
        if order is None:  # what comes before a row's first token is zero, as beyond the end
            return self._pooled(mean, before)
        order = order.expand_as(mean)
        return torch.empty_like(mean).scatter_(-1, order, self._pooled(mean.gather(-1, order), before))

    def _pooled(self, mean: Importance, before: int) -> Importance:
        """Pools so many first slots among themselves."""
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        pooled = pool(mean[..., :before], self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([pooled, mean[..., before:]], dim=-1)
