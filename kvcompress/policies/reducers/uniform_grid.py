"""Image tokens thinned out evenly."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers.staged import Staged, dropping
from kvcompress.policies.registry import REDUCERS

_BITS = 10  # of a row or column number


@REDUCERS.register("uniform_grid")
class UniformGrid(Staged):
    """Keeps image tokens that are spread evenly over their grid, a baseline that looks at no content.

    Source: none, a baseline. The order of the cells is that of ordered dithering (the recursive matrix of B. E. Bayer,
    1973): however many are kept, they are about evenly spread, and those of a later reduction are among those of an
    earlier one. Every grid of the row, and its tokens without a cell, keep the same share.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth.
        keep_shares: share of the image tokens that stays from each of them on.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Keeps the cells that come first in the order."""
        grids = 2 + max(map(len, layer.grids))  # one more for tokens of no grid, and one for all that is no image
        grid = torch.where(layer.is_image, layer.grid + 1, grids - 1)
        order = (grid << 2 * _BITS | _dithered(layer.cell)).argsort(dim=1, stable=True)  # grid by grid
        counts = layer.grid.new_zeros(len(grid), grids).scatter_add(1, grid, torch.ones_like(grid))
        before, ordered = counts.cumsum(1) - counts, grid.gather(1, order)
        place = torch.arange(1, grid.shape[1] + 1, device=grid.device) - before.gather(1, ordered)
        spread = place.double() / counts.gather(1, ordered)
        return dropping(layer, -torch.empty_like(spread).scatter(1, order, spread), self.keep(layer))


def _dithered(cell: Int[Tensor, "batch tokens two"]) -> Int[Tensor, "batch tokens"]:
    """Place of each cell in the order of ordered dithering: bits of row xor column and of row, the lowest first."""
    row, column = cell.clamp(min=0).long().unbind(-1)
    place = torch.zeros_like(row)
    for bit in range(_BITS):
        mixed, plain = (row ^ column) >> bit & 1, row >> bit & 1
        place |= (mixed << 2 * (_BITS - 1 - bit) + 1) | (plain << 2 * (_BITS - 1 - bit))
    return place
