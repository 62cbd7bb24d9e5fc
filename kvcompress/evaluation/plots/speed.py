"""Latency and throughput against the budget, or against the length of the prompt or the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcompress.errors import ConfigError
from kvcompress.evaluation.plots.lines import draw_series, legend
from kvcompress.evaluation.plots.rows import Row, read_series, read_value
from kvcompress.evaluation.plots.style import drawing, new_figure, ruled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("seconds_to_first_token", "time to first token (s)", 1.0),
    ("seconds_per_token", "time per token (ms)", 1000.0),
    ("tokens_per_second", "throughput (tokens/s)", 1.0),
)


@drawing
def speed(rows: Sequence[Row], x: str = "budget") -> Figure:
    """Draws time to first token, time per token and throughput, a line for each policy, with bands for their spread.

    Over budgets, caches without one (`DynamicCache`, `QuantizedCache`, the floor) and policies at budget 1.0 alone are
    level lines to compare with.

    Args:
        rows: results as `kvcompress bench` or `kvcompress evaluate` writes them: `policy`, `budget` and any of
            `seconds_to_first_token`, `seconds_per_token`, `tokens_per_second`, with `NAME_ci_low` and `NAME_ci_high`
            for the band. Without `seconds_per_token` it is 1 / `tokens_per_second`, right for one prompt at a time.
        x: "budget", "prompt_tokens" or "batch".

    Raises:
        ConfigError: if no row has any of the figures.
    """
    rows = [_with_seconds_per_token(row) for row in rows]
    panels = [(series, label, factor) for name, label, factor in _PANELS if (series := read_series(rows, name, x))]
    if not panels:
        raise ConfigError(f"rows: none has any of {', '.join(name for name, _, _ in _PANELS)}")
    figure = new_figure(2.4 * len(panels) + 0.2, 2.7)
    all_axes = figure.subplots(1, len(panels), squeeze=False).ravel()
    for axes, (series, label, factor) in zip(all_axes, panels, strict=True):
        draw_series(axes, series, x, factor)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.07 * factor * max(point.high for line in series for point in line.points))
        ruled(axes)
    legend(figure, max(all_axes, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return figure


def _with_seconds_per_token(row: Row) -> dict[str, Any]:
    found = read_value(row, "tokens_per_second")
    if found is None or read_value(row, "seconds_per_token") is not None or min(found) <= 0:
        return dict(row)
    middle, low, high = (1 / value for value in found)
    ends = {"seconds_per_token_ci_low": high, "seconds_per_token_ci_high": low}
    return {**row, "seconds_per_token": middle, **ends}
