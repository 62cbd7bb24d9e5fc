"""Similar image tokens merged with equal weights, without windows: LightKV without what is new in it."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers.bipartite import Bipartite, merge_in_windows
from kvcompress.policies.reducers.staged import Depth
from kvcompress.policies.registry import REDUCERS


@REDUCERS.register("tome")
class ToMe(Bipartite):
    """Merges the most similar image tokens of each grid, every second one into one of the others.

    Source: ToMe (arXiv 2210.09461, section 3), in the places of LightKV (arXiv 2605.00789).

    *Deviates:* ToMe merges inside a vision tower, compares keys, and weighs a token by how many it stands for; here
    hidden states are compared, as in LightKV, and those that meet weigh the same.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth; None for LightKV's.
        rho: share of a grid's tokens that is merged into others each time, at most a half.
        vision_retention: instead of `after`, image tokens per layer / image tokens, mean over layers; the closest that
            three reductions come to it.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    after: tuple[Depth, ...] | None = None
    rho: float = Field(default=0.5, ge=0.0, le=1.0)
    vision_retention: float | None = Field(default=None, gt=0.0, le=1.0)

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Every grid is one window."""
        alike = torch.ones(layer.grid.shape, dtype=torch.float32, device=layer.hidden.device)
        return merge_in_windows(layer.hidden, layer.on_host.grid, alike, self.rho)
