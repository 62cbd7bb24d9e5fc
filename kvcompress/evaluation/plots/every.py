"""All the pictures that some data gives, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.errors import ConfigError
from kvcompress.evaluation.plots.quality import quality
from kvcompress.evaluation.plots.retention import retention
from kvcompress.evaluation.plots.rows import SPEED, Row, by_unit, metric_names, read_value
from kvcompress.evaluation.plots.speed import speed
from kvcompress.evaluation.plots.style import check_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_results(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draws every metric of result rows against the budget, and their speed.

    Args:
        rows: results as `kvcompress evaluate` writes them, see `quality` and `speed`. Where they are about several
            models or data sets, have questions seen and unseen, or budgets in several units, each has its own pictures.

    Returns:
        Figures by a name fit for a file: the metric or "speed", and model, data, question and unit where there are
        several.

    Raises:
        ConfigError: if the rows hold no metric.
    """
    check_matplotlib()
    about: dict[tuple[str, ...], list[Row]] = {}
    several = len({row.get("question", "seen") for row in rows}) > 1
    for row in rows:
        names = [str(row.get(name, "")) for name in ("model", "data")]
        asked = [f"question-{row.get('question', 'seen')}"] if several else []
        about.setdefault((*names, *asked), []).append(row)
    groups: dict[str, list[Row]] = {}
    for key, found in about.items():
        ending = "" if len(about) == 1 else "".join(f"-{_file_name(name)}" for name in key)
        units = by_unit(found)
        groups |= {f"{ending}-{unit}" if len(units) > 1 else ending: group for unit, group in units.items()}
    figures: dict[str, Figure] = {}
    for ending, group in groups.items():
        for metric in metric_names(group):
            if any(read_value(row, metric) is not None for row in group):
                figures[f"{_file_name(metric)}{ending}"] = quality(group, metric)
        if any(read_value(row, name) is not None for row in group for name in SPEED):
            figures[f"speed{ending}"] = speed(group)
    if not figures:
        raise ConfigError("rows: hold no metric with an interval, and no speed; nothing could be drawn")
    return figures


def plot_profile(profile: Any) -> Figure:
    """Draws retention per layer of an offline profile for each budget, with whiskers for the spread over samples.

    Args:
        profile: an object, or a mapping, with `budgets`, `retention` and, if known, `spread`: for each budget,
            retention and standard deviation of each layer. Without `budgets`, both are mappings by budget.

    Raises:
        ConfigError: if it has no retention.
    """
    shares = _by_budget(profile, "retention")
    if not shares:
        raise ConfigError("profile: has no 'retention'; it must give the retention of each layer for each budget")
    return retention(shares, _by_budget(profile, "spread") or None)


def save_all(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Writes figures under their names into a folder, as PNG and SVG; returns the paths."""
    return [path for name, figure in figures.items() for path in save(figure, Path(folder) / name)]


def _by_budget(profile: Any, name: str) -> dict[float, list[float]]:
    def read(field: str) -> Any:
        return profile.get(field) if isinstance(profile, Mapping) else getattr(profile, field, None)

    found = read(name)
    if not found:
        return {}
    pairs = found.items() if isinstance(found, Mapping) else zip(read("budgets"), found, strict=True)
    return {float(budget): list(layers) for budget, layers in pairs}


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._+" else "-" for letter in text).strip("-")
