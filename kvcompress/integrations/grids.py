"""Where image tokens belong in their images, from the order in which processors write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from kvcompress.errors import UnsupportedModelError
from kvcompress.kernels import sent
from kvcompress.policies.images import ImageGrid, ImageLayout


@dataclass(frozen=True)
class Piece:
    """A grid of image tokens, written row by row, or one for each frame of a video.

    Attributes:
        height: rows.
        width: columns.
        before: tokens before it that belong to no cell.
        line_ends: tokens after each row that belong to no cell.
        after: tokens after it that belong to no cell.
        frames: frames of a video, written one after the other; None for a picture.
    """

    height: int
    width: int
    before: int = 0
    line_ends: int = 0
    after: int = 0
    frames: int | None = None

    @property
    def grids(self) -> int:
        """Number of grids."""
        return 1 if self.frames is None else self.frames

    @property
    def tokens(self) -> int:
        """Tokens of all cells and of none."""
        return self.before + self.grids * self.height * (self.width + self.line_ends) + self.after

    def facts(self, first: int) -> np.ndarray:
        """Grid (-1 for tokens of no cell), row, column, height and width of each token, `[tokens, 5]`.

        Args:
            first: number of its first grid.
        """
        sides = (self.grids, self.height, self.width + self.line_ends)
        cells = np.indices(sides).reshape(3, -1).T
        facts = np.full((self.tokens, 5), -1, dtype=np.int64)
        facts[self.before : self.before + len(cells), :3] = cells
        facts[:, 3:] = self.height, self.width
        none = (facts[:, 2] < 0) | (facts[:, 2] >= self.width)
        facts[:, 0] = np.where(none, -1, first + facts[:, 0])
        return facts


def tile_grid(side: int, image_size: list[int], pinpoints: list[list[int]], base_size: int) -> tuple[int, int]:
    """Height and width of the grid that LLaVA-NeXT stitches from an image's tiles and unpads.

    Args:
        side: features along a side of one tile.
        image_size: height and width of the image in pixels.
        pinpoints: sizes that images are resized to, as in the model's configuration.
        base_size: pixels along a side of one tile.
    """
    down, across = get_anyres_image_grid_shape(image_size, pinpoints, base_size)  # type: ignore[no-untyped-call]
    stitched = torch.empty(1, down * side, across * side, device="meta")
    height, width = unpad_image(stitched, image_size).shape[1:]  # type: ignore[no-untyped-call]
    return int(height), int(width)


def in_turn(images: Iterable[list[Piece]]) -> Callable[[int], list[list[Piece]]]:
    """Gives each row as many of these images, each as its pieces, as its image tokens need; for `layout_of`."""
    left = iter(images)

    def take(tokens: int) -> list[list[Piece]]:
        found: list[list[Piece]] = []
        while tokens > 0 and (pieces := next(left, None)) is not None:
            found.append(pieces)
            tokens -= sum(piece.tokens for piece in pieces)
        return found

    return take


def pieces_within(tokens: int, grids: Sequence[tuple[int, int]], class_token: bool) -> list[Piece]:
    """The first of these grids that so many image tokens have room for, at least one while there is a token.

    Args:
        tokens: image tokens of a row.
        grids: height and width of each image that is left.
        class_token: whether each image may have one more token, before the others; it has if that makes the number of
            tokens come out right.
    """
    found: list[Piece] = []
    for before in (1, 0) if class_token else (0,):
        left, found = tokens, []
        for height, width in grids:
            piece = Piece(height, width, before)
            if left <= 0 or (found and left < piece.tokens):
                break
            found.append(piece)
            left -= piece.tokens
        if left == 0:
            break
    return found


def grids_between_breaks(
    input_ids: Int[Tensor, "batch positions"], is_image: Bool[Tensor, "batch positions"], counts: Sequence[int]
) -> list[tuple[int, int]]:
    """Height and width of images whose rows of tokens are separated by a token, as Pixtral's processor does.

    Args:
        input_ids: ids of a forward.
        is_image: which positions hold image tokens.
        counts: image tokens of each image, row by row.

    Raises:
        UnsupportedModelError: if the rows of an image are not separated by one and the same token, or differ in length.
    """
    marks, found = is_image.nonzero().tolist(), []
    for number, count in enumerate(counts):
        own, marks = marks[:count], marks[count:]
        last = [at for at in range(len(own)) if at + 1 == len(own) or own[at + 1] != [own[at][0], own[at][1] + 1]]
        between = [own[at + 1][1] - own[at][1] if own[at + 1][0] == own[at][0] else 0 for at in last[:-1]]
        breaks = {int(input_ids[row, position + 1]) for row, position in (own[at] for at in last[:-1])}
        width = last[0] + 1 if last else 0
        if last[1:] != list(range(2 * width - 1, count, width)) or set(between) != {2} or len(breaks) != 1:
            raise UnsupportedModelError(
                f"reducer: image {number} has {count} features, but its tokens are not rows of one length with a token "
                "between them, and `generate` hands on no image_sizes; read the prompt with model(**inputs, "
                "cache=cache), which sees them, and generate after it"
            )
        found.append((count // width, width))
    return found


def layout_of(is_image: Bool[Tensor, "batch positions"], pieces_of: Callable[[int], list[list[Piece]]]) -> ImageLayout:
    """Gives every image token its cell; waits for the device once.

    Args:
        is_image: which positions hold image tokens.
        pieces_of: gives the images of a row, each as its pieces, from the number of image tokens left in it; called
            row by row.

    Raises:
        UnsupportedModelError: if a row has more or fewer image tokens than its images.
    """
    grids: list[list[ImageGrid]] = []
    facts = [np.empty((0, 5), dtype=np.int64)]  # grid, cell and size of one image token after another
    image_tokens: list[int] = is_image.sum(1).tolist()
    for row, tokens in enumerate(image_tokens):
        images = pieces_of(tokens)
        expected = sum(piece.tokens for pieces in images for piece in pieces)
        if expected != tokens:
            raise UnsupportedModelError(
                f"reducer: row {row} has {tokens} image tokens, and its {len(images)} images would have "
                f"{expected}; a forward must bring whole images (no prefill in chunks that split one), in the order in "
                "which the processor writes them"
            )
        grids.append([])
        for number, pieces in enumerate(images):
            for piece in pieces:
                facts.append(piece.facts(first=len(grids[row])))
                frames = [None] if piece.frames is None else range(piece.frames)
                grids[row] += [ImageGrid(number, piece.height, piece.width, frame) for frame in frames]
    table = torch.full((*is_image.shape, 5), -1, dtype=torch.int64, device=is_image.device)
    table = table.masked_scatter_(is_image.unsqueeze(-1), sent(np.concatenate(facts), is_image.device))
    return ImageLayout(grids, image_tokens, table[..., 0], table[..., 1:3], table[..., 3:])


def together(pictures: ImageLayout, videos: ImageLayout) -> ImageLayout:
    """Pictures and videos of the same positions; videos are numbered after all pictures of their row."""
    if not any(videos.image_tokens):
        return pictures
    grids, moved = [], videos.grid.clone()
    for row, (first, then) in enumerate(zip(pictures.grids, videos.grids, strict=True)):
        images = 1 + max((grid.image for grid in first), default=-1)
        grids.append([*first, *(replace(grid, image=images + grid.image) for grid in then)])
        moved[row] += len(first) * (videos.grid[row] >= 0)
    of_video = (videos.grid >= 0).unsqueeze(-1)
    return ImageLayout(
        grids,
        [sum(tokens) for tokens in zip(pictures.image_tokens, videos.image_tokens, strict=True)],
        torch.where(of_video[..., 0], moved, pictures.grid),
        torch.where(of_video, videos.cell, pictures.cell),
        torch.where(of_video, videos.size, pictures.size),
    )


def runs(marked: Bool[Tensor, "batch positions"]) -> list[list[tuple[int, int]]]:
    """Where marked positions follow each other: the first and length, for each row; waits for the device once."""
    edges = torch.nn.functional.pad(marked.to(torch.int8), (1, 1)).diff(dim=1)
    found: list[list[tuple[int, int]]] = [[] for _ in marked]
    ends = (edges < 0).nonzero().tolist()
    for (row, first), (_, last) in zip((edges > 0).nonzero().tolist(), ends, strict=True):
        found[row].append((first, last - first))
    return found
