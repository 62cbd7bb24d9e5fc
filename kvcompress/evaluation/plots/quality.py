"""A metric against the budget, a line with its confidence band for each policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcompress.errors import ConfigError
from kvcompress.evaluation.plots.lines import draw_series, legend, name_grey_lines
from kvcompress.evaluation.plots.rows import Row, Series, read_series
from kvcompress.evaluation.plots.style import drawing, new_figure, ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# metric -> what the y axis says, and the factor to its unit
_LABELS: dict[str, tuple[str, float]] = {
    "perplexity": ("perplexity of the answer (lower is better)", 1),
    "rouge1": ("ROUGE-1 against the full cache (higher is better)", 1),
    "rouge2": ("ROUGE-2 against the full cache (higher is better)", 1),
    "rougeL": ("ROUGE-L against the full cache (higher is better)", 1),
    "exact": ("exact answers (%)", 100),
    "contained": ("answers that contain the right one (%)", 100),
    "recall": ("needles found (%)", 100),
    "string_match": ("answers found, as RULER counts them (%)", 100),
    "distinct": ("runs of four words that come once (%)", 100),
    "accuracy": ("right answers (%)", 100),
    "retention": ("retention: kept / seen (%)", 100),
    "kv_bytes": ("key/value cache (MiB)", 2**-20),
    "peak_bytes": ("peak memory (MiB)", 2**-20),
}
_LOG_FROM = 8.0  # largest / smallest value from which on a perplexity is drawn on a logarithmic axis


@drawing
def quality(rows: Sequence[Row], metric: str, *, shown: Sequence[str] | None = None, log: bool | None = None) -> Figure:
    """Draws a metric against the budget, a line for each policy, with bands for confidence intervals.

    A policy that was run at budget 1.0 alone, or without a budget, is drawn as a level line to compare with.

    Args:
        rows: results as `kvcompress evaluate` writes them: `policy`, `budget` and the metric, with `METRIC_ci_low` and
            `METRIC_ci_high` for the band.
        metric: name of the metric in the rows.
        shown: policies to be drawn in colour with their bands; the others are grey lines with their names at the left
            end. All are in colour if None.
        log: whether the y axis is logarithmic; if None, perplexities that are far apart make it so.

    Raises:
        ConfigError: if no row has the metric, or none is of a policy that is to be shown.
    """
    series = read_series(rows, metric)
    if not series:
        raise ConfigError(f"metric: no row has '{metric}'")
    if unknown := sorted({*(shown or ())} - {line.name for line in series}):
        raise ConfigError(f"shown: must be policies of the rows; got {', '.join(unknown)}")
    label, factor = metric_label(metric)
    figure = new_figure(5.0, 3.4)
    axes = figure.subplots()
    draw_series(axes, series, "budget", factor, shown)
    asked = {str(row["question"]) for row in rows if "question" in row}
    axes.set_ylabel(label if asked <= {"seen"} else f"{label}\nquestion {' and '.join(sorted(asked))}")
    if log or (log is None and metric == "perplexity" and _range(series) >= _LOG_FROM):
        _log_scale(axes)
    elif factor == 100:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2.0), min(high, 102.0))
    ruled(axes)
    legend(figure, axes)
    if shown is not None:
        name_grey_lines(figure, axes)
    return figure


def metric_label(metric: str) -> tuple[str, float]:
    """What an axis says about a metric, and the factor from its figures to that unit."""
    return _LABELS.get(metric, (metric.replace("_", " "), 1))


def _range(series: Sequence[Series]) -> float:
    values = [point.value for line in series for point in line.points if point.value > 0]
    return max(values) / min(values) if values else 1.0


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
