"""Retention of each layer, for one budget or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvcompress.errors import ConfigError
from kvcompress.evaluation.plots.style import COLOURS, GREY, HATCHES, drawing, integer_ticks, new_figure, ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEAN = "mean over layers"
_SIDE_BY_SIDE = 4  # budgets whose bars stand next to each other; more of them get a panel each


@drawing
def retention(layers: Mapping[float, Sequence[float]], spread: Mapping[float, Sequence[float]] | None = None) -> Figure:
    """Draws kept / seen of each layer as bars, for each budget; a dotted line is the mean over layers.

    Args:
        layers: retention of each layer, 0 to 1, by budget (a fraction, or tokens per layer).
        spread: standard deviation of each over samples, by budget; drawn as whiskers.

    Raises:
        ConfigError: if there is no budget, or budgets have different numbers of layers.
    """
    if not layers or len({len(shares) for shares in layers.values()}) != 1 or not all(layers.values()):
        raise ConfigError("layers: must give as many layers for every budget, one at least")
    budgets, count = sorted(layers), len(next(iter(layers.values())))
    most = max(max(shares) for shares in layers.values())
    if len(budgets) <= _SIDE_BY_SIDE:
        figure = new_figure(7.0, 2.6)
        axes = figure.subplots()
        width = 0.84 / len(budgets)
        for index, budget in enumerate(budgets):
            shift = (index - (len(budgets) - 1) / 2) * width
            _bars(axes, index, shift, width, layers[budget], (spread or {}).get(budget), budget)
        axes.set(xlabel="layer", ylabel="retention: kept / seen (%)")
        _finish(axes, count, most)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend([*handles, axes.lines[-1]], [*labels, _MEAN], loc="outside upper center", ncols=len(handles) + 1)
        return figure
    columns = 3
    figure = new_figure(7.0, 0.4 + 1.45 * -(-len(budgets) // columns))
    panels = figure.subplots(-(-len(budgets) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for index, (axes, budget) in enumerate(zip(panels, budgets, strict=False)):
        _bars(axes, 0, 0.0, 0.84, layers[budget], (spread or {}).get(budget), budget)
        axes.set_title(f"budget {budget_label(budget)}")
        _finish(axes, count, most)
        axes.tick_params(labelbottom=index + columns >= len(budgets))
    for axes in panels[len(budgets) :]:
        axes.set_visible(False)
    figure.legend([panels[0].lines[-1]], [_MEAN], loc="outside upper center")
    figure.supxlabel("layer", fontsize=8)
    figure.supylabel("retention: kept / seen (%)", fontsize=8)
    return figure


def budget_label(budget: float) -> str:
    """A budget in words: a share up to 1, tokens per layer above."""
    return f"{100 * budget:.4g} %" if budget <= 1 else f"{budget:,.0f} tokens"


def _bars(
    axes: Axes,
    index: int,
    shift: float,
    width: float,
    shares: Sequence[float],
    spread: Sequence[float] | None,
    budget: float,
) -> None:
    at = [layer + shift for layer in range(len(shares))]
    axes.bar(
        at,
        [100 * share for share in shares],
        width,
        yerr=None if spread is None else [100 * value for value in spread],
        color=COLOURS[index],
        hatch=HATCHES[index],
        edgecolor="white" if HATCHES[index] else COLOURS[index],
        linewidth=0,
        error_kw={"elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7},
        label=f"budget {budget_label(budget)}",
    )
    axes.axhline(100 * sum(shares) / len(shares), color=GREY, linestyle=":", linewidth=0.9, zorder=3)


def _finish(axes: Axes, layers: int, most: float) -> None:
    axes.set_xlim(-0.7, layers - 0.3)
    axes.set_ylim(0, min(112 * most + 2, 104))
    integer_ticks(axes)
    ruled(axes)
