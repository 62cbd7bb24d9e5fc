"""Image tokens thinned out evenly."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kvcompress.kernels import sent
from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers.staged import Staged
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
        """Keeps the cells that come first in the order, which is found on the host."""
        tokens, own = layer.on_host, np.arange(layer.index.shape[1])
        rows = np.arange(len(layer.grids))[:, None]
        grids = 3 + tokens.grid.max(initial=-1)  # the first is of no grid, the last of what is no image
        grid = np.where(tokens.is_image, tokens.grid + 1, grids - 1)
        order = (grid << 2 * _BITS | _dithered(tokens.cell)).argsort(axis=1, kind="stable")  # grid by grid
        counts = np.bincount((rows * grids + grid).ravel(), minlength=grids * len(rows)).reshape(-1, grids)
        ordered, spread = np.take_along_axis(grid, order, 1), np.empty(grid.shape)
        place = own + 1 - (counts.cumsum(1) - counts)[rows, ordered]
        np.put_along_axis(spread, order, place / counts[rows, ordered], 1)
        first = np.where(tokens.is_image, spread, np.inf).argsort(axis=1, kind="stable")
        stays = np.empty(grid.shape, dtype=bool)
        np.put_along_axis(stays, first, own < np.array(self.keep(layer))[:, None], 1)
        return Reduced(sent(np.where(stays | ~tokens.is_image, own, -1), layer.hidden.device), layer.hidden)


def _dithered(cell: Int[np.ndarray, "batch tokens two"]) -> Int[np.ndarray, "batch tokens"]:
    """Place of each cell in the order of ordered dithering: bits of row xor column and of row, the lowest first."""
    row, column = np.moveaxis(cell.clip(0), -1, 0)
    place: np.ndarray = np.zeros_like(row)
    for bit in range(_BITS):
        mixed, plain = (row ^ column) >> bit & 1, row >> bit & 1
        place |= (mixed << 2 * (_BITS - 1 - bit) + 1) | (plain << 2 * (_BITS - 1 - bit))
    return place
