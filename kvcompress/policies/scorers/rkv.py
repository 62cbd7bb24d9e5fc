"""R-KV: attention less redundancy, for long chains of thought that repeat themselves."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS
from kvcompress.policies.scorers.snapkv import SnapKV

_TILE = 256  # keys compared with all others at once


@SCORERS.register("rkv")
class RKV(SnapKV):
    """A share of the attention of the last queries, less the rest of how much a key is like the others of its head.

    Source: R-KV (arXiv 2505.24133; its released code for all constants).

    Redundancy is the softmax, over a head's slots, of the mean cosine that other keys have with a slot's. Of each key's
    cosines above the threshold, the one with the latest such token does not count: the last of several copies is not
    redundant. The score is share * votes - (1 - share) * redundancy, with votes as in `snapkv`.

    *Deviates:* votes are the layer's own probabilities, averaged over the heads of a group; the code takes the highest
    logit of the group, and its softmax over the tokens before the window alone. Where no cosine is above the threshold
    nothing is left out; the code leaves out the one with the first token.

    Args:
        window: number of last queries (tokens) that vote, and of last tokens that are protected.
        kernel: width of the pooling of votes in slots, odd; 1 for none.
        pool: "max", or "avg", where slots beyond the end count as zero.
        share: factor on the votes, 0 to 1.
        threshold: cosine above which a key counts as a copy.
    """

    mass: ClassVar[bool] = False

    window: int = Field(default=8, ge=1)
    kernel: int = Field(default=7, ge=1)
    pool: Literal["avg", "max"] = "max"
    share: float = Field(default=0.07, ge=0, le=1)
    threshold: float = Field(default=0.5, ge=-1, le=1)

    def score(self, layer: LayerContext) -> Importance:
        """Costs tokens^2 x head_dim, a tile at a time."""
        redundancy = self._likeness(layer)
        redundancy = layer.at_tokens(redundancy, otherwise=torch.finfo(torch.float32).min).softmax(-1)
        return layer.at_tokens(self.share * super().score(layer) - (1 - self.share) * redundancy)

    def _likeness(self, layer: LayerContext) -> Float[Tensor, "batch kv_heads tokens"]:
        """Mean over a head's keys of their cosines with each one, but for those that are left out."""
        unit = F.normalize(layer.keys.float(), dim=-1)
        if layer.valid is not None:
            unit = torch.where(layer.valid.unsqueeze(-1), unit, 0.0)
        total, tokens = torch.zeros(unit.shape[:3], device=unit.device, dtype=torch.float32), unit.shape[2]
        slots = torch.arange(tokens, device=unit.device)
        index = layer.index.unsqueeze(2)
        for first in range(0, tokens, _TILE):
            tile = unit[:, :, first : first + _TILE]
            cosine = tile @ unit.transpose(2, 3)
            own = slots == slots[first : first + _TILE, None]
            cosine = cosine.masked_fill(own, 0.0)
            copies = torch.where((cosine > self.threshold) & ~own, index, -1)
            latest, place = copies.max(-1, keepdim=True)
            cosine = cosine.masked_fill((slots == place) & (latest >= 0), 0.0)
            total += cosine.sum(2)
        return total / layer.held.clamp(min=1)
