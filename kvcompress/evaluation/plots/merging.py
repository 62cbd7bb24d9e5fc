"""Which patches of an image a reducer merged into which."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.cache.report import CacheReport
from kvcompress.errors import ConfigError
from kvcompress.evaluation.image_grid import PatchGrid
from kvcompress.evaluation.plots.style import COLOURS, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VEIL = 0.72  # how much of a patch its group's colour covers
_CAPTION = "patches of one colour are one token; a dot marks where it lies; neighbouring tokens differ in colour"
_DROPPED = 0.62  # grey, on which white shapes show as black ones do
_CAPTION_DROPPED = "grey patches were dropped; a dot marks those that stay"


def groups(report: CacheReport, grid: PatchGrid, layers: int, row: int = 0) -> np.ndarray:
    """Number of the position that each patch is part of after so many layers, `[rows, columns]`; -1 where dropped."""
    into = report.went_into[layers][row]
    found = np.full(grid.shape, -1)
    for position, cell in zip(grid.positions, grid.cells, strict=True):
        found[cell] = into[position]
    return found


@drawing
def merging(report: CacheReport, grid: PatchGrid, picture: Any | None = None, *, row: int = 0) -> Figure:
    """Draws the image, and for each reduction its patches coloured by the token that they are part of from there on.

    Args:
        report: of a cache with a reducer that has read the prompt.
        grid: where the image's tokens lie, see `square_grid`.
        picture: the image as the model saw it: a PIL image or an array; grey if None.
        row: of the batch.

    Raises:
        ConfigError: if the report is of a cache without a reducer.
    """
    if not report.went_into:
        raise ConfigError(
            "report: no reducer acted; draw the report of a cache with reducer=... that has read an image"
        )
    stages = sorted(report.went_into)
    side = 7.0 / (len(stages) + 1)
    figure = new_figure(7.0, side * grid.shape[0] / grid.shape[1] + 0.36)
    first, *panels = figure.subplots(1, len(stages) + 1)
    _show(first, picture, grid.shape)
    dropped = False
    first.set_title(_title(0, stages[0], len(grid.cells)), fontsize=7, pad=2.5)
    for axes, (layers, end) in zip(panels, pairwise((*stages, len(report.layer_tokens))), strict=True):
        found = groups(report, grid, layers, row)
        dropped |= bool((found < 0).any())
        _show(axes, picture, grid.shape)
        _colour(axes, found)
        stay = [
            (cell, position)
            for cell, position in zip(grid.cells, grid.positions, strict=True)
            if found[cell] == position
        ]
        axes.plot([x + 0.5 for (_, x), _ in stay], [y + 0.5 for (y, _), _ in stay], "k.", markersize=1.8)
        axes.set_title(_title(layers, end, len(stay)), fontsize=7, pad=2.5)
    figure.supxlabel(_CAPTION_DROPPED if dropped else _CAPTION, fontsize=7)
    return figure


def _title(start: int, end: int, tokens: int) -> str:
    layers = f"layer {start}" if end == start + 1 else f"layers {start}-{end - 1}"
    return f"{layers}: {tokens} tokens"


def _show(axes: Axes, picture: Any | None, shape: tuple[int, int]) -> None:
    extent = (0, shape[1], shape[0], 0)
    if picture is None:
        axes.imshow(np.full((1, 1), 0.45), cmap="gray", vmin=0, vmax=1, extent=extent)
    else:
        axes.imshow(np.asarray(picture), extent=extent, interpolation="antialiased")
    axes.set_axis_off()


def _colour(axes: Axes, found: np.ndarray) -> None:
    """Lays a colour over every patch, such that no two groups that touch have the same as long as colours last."""
    from matplotlib.colors import to_rgb

    palette = [to_rgb(colour) for colour in COLOURS[:-1]]
    chosen: dict[int, int] = {}
    for group in dict.fromkeys(found[found >= 0].tolist()):
        taken = {chosen.get(other) for other in _touching(found, group)}
        free = [number for number in range(len(palette)) if number not in taken]
        chosen[group] = min(free or range(len(palette)), key=lambda number: list(chosen.values()).count(number))
    veil = np.full((*found.shape, 4), _DROPPED)
    veil[..., 3] = np.where(found < 0, 0.78, _VEIL)
    for group, number in chosen.items():
        veil[found == group, :3] = palette[number]
    axes.imshow(veil, extent=(0, found.shape[1], found.shape[0], 0), interpolation="nearest")


def _touching(found: np.ndarray, group: int) -> set[int]:
    """Groups with a patch next to one of this group, corners included."""
    around = np.pad(found, 1, constant_values=-1)
    own = np.argwhere(around == group)
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return {int(around[y + dy, x + dx]) for y, x in own.tolist() for dy, dx in steps} - {group, -1}
