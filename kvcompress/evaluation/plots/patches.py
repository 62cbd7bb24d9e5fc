"""Which patches of an image each layer kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.cache.report import CacheReport
from kvcompress.errors import ConfigError
from kvcompress.evaluation.image_grid import PatchGrid
from kvcompress.evaluation.plots.style import drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FADED = 0.78  # how far an evicted patch goes to the veil's grey, on which white shapes show as black ones do
_VEIL = 0.62
_EDGE = "#D55E00"
_CAPTION = "kept patches are outlined, evicted ones faded"
_CAPTION_OF_HEADS = (
    "a patch is faded the more, the fewer heads keep it; outlined are those that at least half of them keep"
)
_ACROSS = 8  # panels in a row, at most


def kept_share(report: CacheReport, grid: PatchGrid, layer: int, row: int = 0) -> np.ndarray:
    """Share of a layer's heads that hold each patch, `[rows, columns]` of the grid, 0 to 1; NaN where no token lies."""
    sets = [set(held) for held in report.held_positions[layer][row]]
    share = np.full(grid.shape, np.nan)
    for position, cell in zip(grid.positions, grid.cells, strict=True):
        share[cell] = sum(position in held for held in sets) / len(sets)
    return share


@drawing
def patches(
    report: CacheReport,
    grid: PatchGrid,
    picture: Any | None = None,
    *,
    layers: Sequence[int] | None = None,
    row: int = 0,
) -> Figure:
    """Draws the image once for each layer, with the patches that the layer evicted faded out and the others outlined.

    Where heads keep different tokens, a patch fades the more the fewer heads keep it; the outline is around those that
    at least half of them keep.

    Args:
        report: of a cache that has read the prompt.
        grid: where the image's tokens lie, see `square_grid`.
        picture: the image as the model saw it: a PIL image or an array; grey if None.
        layers: which layers; all if None.
        row: of the batch.

    Raises:
        ConfigError: if the report has no such layer.
    """
    count = len(report.held_positions)
    shown = list(range(count)) if layers is None else list(layers)
    if not shown or not all(0 <= layer < count for layer in shown):
        raise ConfigError(f"layers: must be some of 0 to {count - 1}; got {shown}")
    across = _panels_across(len(shown))
    down = -(-len(shown) // across)
    rows, columns = grid.shape
    side = 7.0 / across
    figure = new_figure(7.0, down * (side * rows / columns + 0.16) + 0.2)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, layer in zip(panels, shown, strict=False):
        share = kept_share(report, grid, layer, row)
        _draw(axes, share, picture)
        axes.set_title(f"layer {layer}: {np.nansum(share):.0f} of {len(grid.cells)}", fontsize=7, pad=2.5)
    for axes in panels:
        axes.set_axis_off()
    sets = max(len(report.held_positions[layer][row]) for layer in shown)
    figure.supxlabel(_CAPTION_OF_HEADS if sets > 1 else _CAPTION, fontsize=7)
    return figure


def _panels_across(count: int) -> int:
    """Panels in a row so that rows are full, where that is near a handsome shape."""
    down = -(-count // _ACROSS)
    return -(-count // max(down, 2 if count > 4 else 1))


def _draw(axes: Axes, share: np.ndarray, picture: Any | None) -> None:
    from matplotlib.collections import LineCollection

    rows, columns = share.shape
    extent = (0, columns, rows, 0)
    if picture is None:
        axes.imshow(np.full((1, 1), 0.45), cmap="gray", vmin=0, vmax=1, extent=extent)
    else:
        axes.imshow(np.asarray(picture), extent=extent, interpolation="antialiased")
    veil = np.full((rows, columns, 4), _VEIL)
    veil[..., 3] = _FADED * (1 - np.nan_to_num(share))
    axes.imshow(veil, extent=extent, interpolation="nearest")
    axes.add_collection(LineCollection(_outline(np.nan_to_num(share) >= 0.5), colors=_EDGE, linewidths=0.8))
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def _outline(kept: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Edges between cells that are kept and cells, or margins, that are not."""
    around = np.pad(kept, 1)
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for y, x in np.argwhere(around[1:, 1:-1] != around[:-1, 1:-1]).tolist():
        lines.append(((x, y), (x + 1, y)))
    for y, x in np.argwhere(around[1:-1, 1:] != around[1:-1, :-1]).tolist():
        lines.append(((x, y), (x, y + 1)))
    return lines
