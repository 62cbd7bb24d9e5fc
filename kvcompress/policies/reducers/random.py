"""Image tokens dropped at random."""

from __future__ import annotations

from kvcompress.policies.noise import noise
from kvcompress.policies.reducers.staged import Staged, dropping
from kvcompress.registry import REDUCERS
from kvcompress.shapes import Reduced, ReductionContext


@REDUCERS.register("random")
class RandomReducer(Staged):
    """Drops image tokens at random, a baseline: what a method must beat.

    A token's chance depends on the seed and on its place alone, so a row loses the same tokens in any batch.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth.
        keep_shares: share of the image tokens that stays from each of them on.
        seed: another seed drops others.
    """

    seed: int = 0

    def reduce(self, row: ReductionContext) -> Reduced:
        """Keeps the tokens with the largest noise."""
        return dropping(row, noise(f"reducer {self.seed}", row.index), self.keep(row))
