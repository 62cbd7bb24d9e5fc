"""Image tokens dropped at random."""

from __future__ import annotations

from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.noise import noise
from kvcompress.policies.reducers.staged import Staged, dropping
from kvcompress.policies.registry import REDUCERS


@REDUCERS.register("random")
class RandomReducer(Staged):
    """Drops image tokens at random, a baseline: what a method must beat.

    Source: none, a baseline (see `kvcompress.policies.noise`).

    A token's chance depends on the seed and on its place alone, so a row loses the same tokens in any batch.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth.
        keep_shares: share of the image tokens that stays from each of them on.
        seed: another seed drops others.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    seed: int = 0

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Keeps the tokens with the largest noise."""
        return dropping(layer, noise(f"reducer {self.seed}", layer.index.clamp(min=0)), self.keep(layer))
