"""Lines over budgets or lengths, each with its band: what pictures of results are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvcompress.errors import ConfigError
from kvcompress.evaluation.plots.rows import Series
from kvcompress.evaluation.plots.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Grey and dotted, so that they stay behind the policies' colours.
_REFERENCES = (("black", (0, (1, 1.5))), ("0.45", (0, (5, 2))), ("black", (0, (7, 2, 1, 2))), ("0.6", "-"))


_NAMES_IN_A_ROW = 4
_GREY, _GREY_LINE = "grey ", "0.72"
_NAME_HIGH, _NAMES_WIDE = 9.0, 0.2  # points between names beside grey lines; their room, of the axis
_UNITS = {"fraction": ("% of the tokens", 100.0), "tokens": ("tokens per layer", 1.0), "bytes": ("MiB", 2.0**-20)}


def draw_series(
    axes: Axes, series: Sequence[Series], x: str, factor: float = 1.0, shown: Sequence[str] | None = None
) -> None:
    """Draws a line with markers and a band for each policy, a level line for each reference, and the x axis.

    Args:
        axes: where.
        series: the lines.
        x: what they stand over: "budget", "prompt_tokens" or "batch".
        factor: from the figures to the unit of the y axis.
        shown: policies in colour, the others grey and without band (`name_grey_lines` names them); all if None.
    """
    label, scale = _x_label(series, x)
    references = [line for line in series if line.reference]
    for index, line in enumerate(references):
        (point, *_), (colour, dashes) = line.points, _REFERENCES[index % len(_REFERENCES)]
        axes.axhline(factor * point.value, color=colour, linestyle=dashes, linewidth=1.1, label=line.name, zorder=1.5)
        if point.low != point.high and len(references) == 1:  # bands of several would hide one another
            axes.axhspan(factor * point.low, factor * point.high, color=colour, alpha=0.08, linewidth=0)
    policies = [line for line in series if not line.reference]
    if shown is not None:
        for line in (line for line in policies if line.name not in shown):
            at, middle = ([scale * point.x for point in line.points], [factor * point.value for point in line.points])
            (drawn,) = axes.plot(at, middle, color=_GREY_LINE, linewidth=0.8, zorder=1.2)
            drawn.set_gid(f"{_GREY}{line.name}")
    ticks = sorted({scale * point.x for line in policies or references for point in line.points})
    policies = [line for line in policies if shown is None or line.name in shown]
    for index, line in enumerate(policies):
        style = look(index)
        # at a single budget, side by side, so that no whisker covers another
        aside = 0.6 * ticks[0] * (index - (len(policies) - 1) / 2) / len(policies) if len(ticks) == 1 else 0.0
        at = [scale * point.x + aside for point in line.points]
        middle = [factor * point.value for point in line.points]
        low, high = ([factor * getattr(point, end) for point in line.points] for end in ("low", "high"))
        axes.plot(at, middle, label=line.name, **style)
        if len(at) > 1:
            axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)
        elif low != high:
            axes.errorbar(at, middle, [[middle[0] - low[0]], [high[0] - middle[0]]], color=style["color"], capsize=2)
    if len(ticks) == 1 or not any(line.held for line in policies):  # what was held is rarely round
        axes.set_xticks(ticks, [f"{tick:,.4g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
    margin = max(0.05 * (ticks[-1] - ticks[0]), 0.1 * ticks[-1] if ticks[-1] < 1.2 * ticks[0] else 0.0)
    if len(ticks) == 1:
        margin = 0.5 * ticks[0]
    axes.set_xlim(ticks[0] - margin, ticks[-1] + margin)
    axes.set_xlabel(label)


def legend(figure: Figure, axes: Axes) -> None:
    """Names of the lines, above the picture, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // _NAMES_IN_A_ROW)
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // rows))


def name_grey_lines(figure: Figure, axes: Axes) -> None:
    """Writes the name of each grey line at its left end, as far apart as the letters are high."""
    lines = [line for line in axes.lines if str(line.get_gid()).startswith(_GREY)]
    if not lines:
        return
    left, right = axes.get_xlim()
    axes.set_xlim(left - _NAMES_WIDE * (right - left), right)
    figure.draw_without_rendering()  # lays it out, so that the height of the axes is known
    place = axes.transAxes.inverted()
    high = _NAME_HIGH * figure.dpi / 72 / axes.get_window_extent().height
    starts = [np.asarray(axes.transData.transform(np.asarray(line.get_xydata())))[0] for line in lines]
    ends: list[tuple[float, float]] = [tuple(np.asarray(place.transform(start)).tolist()) for start in starts]
    order = sorted(range(len(lines)), key=lambda number: ends[number][1])
    heights = _apart([ends[number][1] for number in order], high)
    for number, height in zip(order, heights, strict=True):
        x, y = ends[number]
        axes.annotate(
            str(lines[number].get_gid()).removeprefix(_GREY),
            (x, y),
            (x - 0.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=6,
            color="0.35",
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1},
        ).set_in_layout(False)


def _apart(wanted: Sequence[float], high: float) -> list[float]:
    """Heights from 0 to 1, near ascending ones, that lie as far apart as letters are high, or as there is room for."""
    found: list[float] = []
    high = min(high, 1 / max(1, len(wanted)))
    for number, height in enumerate(wanted):
        found.append(max(height, found[-1] + high if number else high / 2))
    above = 1 - high / 2
    for number in range(len(found) - 1, -1, -1):
        found[number] = min(found[number], above)
        above = found[number] - high
    return found


def _x_label(series: Sequence[Series], x: str) -> tuple[str, float]:
    if x == "budget":
        units = sorted({line.unit for line in series if not line.reference}) or ["fraction"]
        if len(units) > 1:
            raise ConfigError(f"rows: budgets must be of one unit; got {', '.join(units)}; draw them one by one")
        unit, scale = _UNITS.get(units[0], (units[0], 1.0))
        return f"{'held' if any(line.held for line in series) else 'budget'} ({unit})", scale
    return {"prompt_tokens": "prompt (tokens)", "batch": "batch (prompts at a time)"}.get(x, x.replace("_", " ")), 1.0
