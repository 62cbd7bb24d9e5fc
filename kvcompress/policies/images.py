"""Where image tokens belong in their images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """A rectangle of image features: one an image in LLaVA-1.5, two in LLaVA-NeXT (a base, and its tiles in one).

    A video is an image of several grids, one for each frame that its features tell apart.

    Attributes:
        image: number of the image or video in its row; videos come after all images.
        height: rows of features.
        width: columns of features.
        frame: number of the frame in its video, from 0; None for pictures.
    """

    image: int
    height: int
    width: int
    frame: int | None = None


@dataclass(frozen=True)
class ImageLayout:
    """Where the image tokens of a forward belong in their images.

    Attributes:
        grids: the grids of each row of the batch, in order.
        image_tokens: image tokens of each row, those of no grid included.
        grid: number of the grid of each position among those of its row; -1 for text and for image tokens of no grid
            (the ends of LLaVA-NeXT's lines).
        cell: row and column in the grid; meaningless where there is no grid. The time axis of a video is in its grids,
            one for each frame.
        size: height and width of the grid; meaningless where there is no grid.
    """

    grids: list[list[ImageGrid]]
    image_tokens: list[int]
    grid: Int[Tensor, "batch positions"]
    cell: Int[Tensor, "batch positions two"]
    size: Int[Tensor, "batch positions two"]

    def aligned(self, positions: Int[Tensor, "batch positions"]) -> ImageLayout:
        """The same images with positions in another order.

        Args:
            positions: for each new position, the one whose token it gets.
        """
        positions = positions.to(self.grid.device).long()
        pairs = positions.unsqueeze(-1).expand_as(self.cell)
        return replace(
            self, grid=self.grid.gather(1, positions), cell=self.cell.gather(1, pairs), size=self.size.gather(1, pairs)
        )


_Numbers = TypeVar("_Numbers", np.ndarray, Tensor)


@dataclass(frozen=True)
class TokenFacts(Generic[_Numbers]):
    """What is known of a forward's tokens: as a numpy array on the host, or as a tensor where the model is.

    Attributes:
        numbers: `[batch, tokens, 7]`: the index of each token, whether it is an image token, its grid, row, column,
            height and width; all -1 for padding.
    """

    numbers: _Numbers

    @property
    def index(self) -> _Numbers:
        """Number of tokens of the row that came before, `[batch, tokens]`; -1 for padding."""
        return self.numbers[..., 0]

    @property
    def is_image(self) -> _Numbers:
        """Which are image tokens, `[batch, tokens]`."""
        found: _Numbers = self.numbers[..., 1] == 1
        return found

    @property
    def grid(self) -> _Numbers:
        """Number of the grid in the row, `[batch, tokens]`; -1 where there is none."""
        return self.numbers[..., 2]

    @property
    def cell(self) -> _Numbers:
        """Row and column in the grid, `[batch, tokens, 2]`; meaningless where there is none."""
        return self.numbers[..., 3:5]

    @property
    def size(self) -> _Numbers:
        """Height and width of the grid, `[batch, tokens, 2]`; meaningless where there is none."""
        return self.numbers[..., 5:]
