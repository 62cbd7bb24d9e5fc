"""Windows of a grid of image tokens: which one each token lies in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.kernels import sent
from kvcompress.policies.context import ReductionContext
from kvcompress.policies.images import ImageGrid

_LEAST = 8  # tokens per window; a grid with fewer is left alone
_NEVER = 2**62  # more tokens than there are


def windows_of(layer: ReductionContext, across: list[int]) -> Int[Tensor, "batch tokens"]:
    """Number of each token's window in its row; -1 for text and in grids that are left alone.

    The sum of what its grid and its row say, and of what its column says, both known before on the host.

    Args:
        layer: what is there, with the grids of every row.
        across: windows along each side of a row's grids.
    """
    known = _known(layer.grids, across)
    table, grid = sent(known.table, layer.grid.device), layer.grid + 1
    bands, least = table[:, : known.places], table[:, known.places :, 0]
    place = torch.add(layer.cell, grid.unsqueeze(-1), alpha=known.width).clamp(min=0, max=known.places - 1)
    tokens = torch.zeros_like(least).scatter_add_(1, grid, torch.ones_like(grid))
    window: Tensor = bands.gather(1, place).sum(-1)
    return window.masked_fill((tokens < least).gather(1, grid), -1)


class _Known(NamedTuple):
    """What the grids of all rows say of windows, text before them as a grid that is left alone.

    Attributes:
        table: `[batch, places + grids, 2]`: for each grid and number along a side, what the row and the column of a
            token say of its window; then for each grid the fewest tokens with which it is not left alone, twice.
        width: places of a grid.
        places: places of all grids.
    """

    table: np.ndarray
    width: int
    places: int


def _known(grids: list[list[ImageGrid]], across: list[int]) -> _Known:
    most = 1 + max(map(len, grids))
    width = 1 + max(max(grid.height, grid.width) for row in grids for grid in row)
    table = np.zeros((len(grids), most * (width + 1), 2), dtype=np.int64)
    bands, least = table[:, : most * width].reshape(len(grids), most, width, 2), table[:, most * width :]
    least[:, 0] = _NEVER
    for row, (own, sides) in enumerate(zip(grids, across, strict=True)):
        for number, grid in enumerate(own):
            bands[row, number + 1, : grid.height, 0] = number * sides**2 + _bands(grid.height, sides) * sides
            bands[row, number + 1, : grid.width, 1] = _bands(grid.width, sides)
        least[row, 1:] = _LEAST * sides**2
    return _Known(table, width, most * width)


def _bands(length: int, bands: int) -> np.ndarray:
    """Which of so many bands each place along a side lies in; the first ones are wider by a remainder."""
    width, wider = divmod(length, bands)
    return np.repeat(np.arange(bands), [width + 1] * wider + [width] * (bands - wider))
