"""Windows of a grid of image tokens: which one each token lies in."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kvcompress.policies.images import TokenFacts

_LEAST = 8  # tokens per window; a grid with fewer is left alone


def windows_of(tokens: TokenFacts[np.ndarray], across: list[int]) -> Int[np.ndarray, "batch tokens"]:
    """Number of each token's window in its row; -1 for text and in grids that are left alone.

    Args:
        tokens: what the host knows of them.
        across: windows along each side of a row's grids.
    """
    grid, sides = tokens.grid, np.asarray(across)[:, None]
    bands = _bands(tokens.cell, tokens.size, sides[..., None])
    window = (grid * sides + bands[..., 0]) * sides + bands[..., 1]
    grids = 1 + max(grid.max(initial=-1), 0)
    of_batch = grid + grids * np.arange(len(grid))[:, None]
    counts = np.bincount(of_batch[grid >= 0], minlength=grids * len(grid))
    alone = (grid < 0) | (counts[np.where(grid < 0, 0, of_batch)] < _LEAST * sides**2)
    return np.where(alone, -1, window)


def _bands(
    place: Int[np.ndarray, "batch tokens two"],
    length: Int[np.ndarray, "batch tokens two"],
    bands: Int[np.ndarray, "batch one one"],
) -> Int[np.ndarray, "batch tokens two"]:
    """Which of so many bands a place along a side lies in; the first ones are wider by a remainder."""
    width, wider = np.divmod(np.maximum(length, 0), bands)
    edge = wider * (width + 1)
    found: np.ndarray = np.where(place < edge, place // (width + 1), wider + (place - edge) // np.maximum(width, 1))
    return found
