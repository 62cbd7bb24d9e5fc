"""Reading figures out of result rows: what `kvcompress evaluate` and `kvcompress bench` write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One measured value.

    Attributes:
        x: where it stands.
        value: the figure.
        low: lower end of its confidence interval or spread; the value itself where none is known.
        high: upper end.
    """

    x: float
    value: float
    low: float
    high: float


@dataclass
class Series:
    """The points of one policy, by x.

    Attributes:
        name: of the policy.
        points: ascending by x.
        unit: of x, where that is a budget: "fraction", "tokens" or "bytes".
        held: whether x is what was held, rather than a budget that may not have been kept.
        reference: whether it keeps everything, or has no budget at all: a line to compare with.
    """

    name: str
    unit: str = ""
    held: bool = False
    points: list[Point] = field(default_factory=list)
    reference: bool = False


def read_value(row: Row, name: str) -> tuple[float, float, float] | None:
    """A metric of a row, with the ends of its interval; None where the row lacks it.

    It stands under its name in the row or in the row's `metrics`, as an object of `value`, `ci_low` and `ci_high`, or
    as a number. Then its interval is `ci[NAME]`, a pair, or `NAME_ci_low` and `NAME_ci_high`. Ends that are no
    confidence interval are called `low` and `high`.
    """
    metrics = row.get("metrics")
    for holder in (metrics if isinstance(metrics, Mapping) else {}, row):
        found = holder.get(name)
        if isinstance(found, Mapping):
            middle = found.get("value")
            low, high = _ends(found, "")
        else:
            middle, (low, high) = found, _ends(holder, f"{name}_")
        if isinstance(middle, (int, float)) and not isinstance(middle, bool):
            return (
                float(middle),
                float(middle if low is None else low),
                float(middle if high is None else high),
            )
    return None


def _ends(holder: Row, prefix: str) -> tuple[float | None, float | None]:
    pairs = holder.get("ci")
    if isinstance(pairs, Mapping) and prefix.removesuffix("_") in pairs:
        low, high = pairs[prefix.removesuffix("_")]
    else:
        low, high = (holder.get(f"{prefix}ci_{end}", holder.get(f"{prefix}{end}")) for end in ("low", "high"))
    return low, high


def unit_of(row: Row) -> str | None:
    """Unit of a row's budget: as it says, else a fraction up to 1 and tokens above; None for a row without budget."""
    budget = row.get("budget")
    if not isinstance(budget, (int, float)):
        return None
    return str(row.get("budget_unit") or ("fraction" if budget <= 1 else "tokens"))


def by_unit(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows whose budgets are of one unit, by that unit, each with all the rows that are references."""
    references = _references(rows)
    units = dict.fromkeys(
        unit for row in rows if str(row.get("policy")) not in references and (unit := unit_of(row)) is not None
    )
    return {
        unit: [row for row in rows if str(row.get("policy")) in references or unit_of(row) == unit]
        for unit in units or ("fraction",)
    }


def _references(rows: Iterable[Row]) -> set[str]:
    """Policies without a budget, or with the budget 1.0 alone."""
    budgets: dict[str, set[Any]] = {}
    for row in rows:
        budget = row.get("budget")
        budgets.setdefault(str(row.get("policy")), set()).add(None if budget is None else (unit_of(row), budget))
    return {policy for policy, found in budgets.items() if found <= {None, ("fraction", 1.0)}}


def read_series(rows: Iterable[Row], metric: str, x: str = "budget") -> list[Series]:
    """The points of each policy, in the order in which policies first come.

    Over budgets, points stand at what was held, where all rows tell: retention for fractions, tokens per layer for
    tokens, bytes for bytes. There a policy without a budget, or with the budget 1.0 alone, is a reference. Where
    several rows of a policy have the same budget (or other x), the last one counts.
    """
    rows = list(rows)
    references = _references(rows) if x == "budget" else set()
    held = x == "budget" and all(_held(row) is not None for row in rows if str(row.get("policy")) not in references)
    found: dict[str, Series] = {}
    points: dict[str, dict[float, Point]] = {}
    for row in rows:
        figures = read_value(row, metric)
        if figures is None:
            continue
        name, given = str(row.get("policy")), row.get(x)
        at = float(given) if isinstance(given, (int, float)) else 1.0
        found.setdefault(name, Series(name, unit=unit_of(row) or "", held=held, reference=name in references))
        place = _held(row) if held else None
        points.setdefault(name, {})[at] = Point(at if place is None else place, *figures)
    for name, series in found.items():
        series.points = sorted(points[name].values(), key=lambda point: point.x)
    return list(found.values())


def _held(row: Row) -> float | None:
    """What a row says was held, in the unit of its budget; None where it does not say."""
    found = row.get({"tokens": "held_tokens", "bytes": "kv_bytes"}.get(unit_of(row) or "", "retention"))
    return float(found) if isinstance(found, (int, float)) else None


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Metrics that have an interval somewhere, or stand in a row's `metrics`, in the order in which they first come."""
    names: dict[str, None] = {}
    for row in rows:
        metrics = row.get("metrics")
        if isinstance(metrics, Mapping):
            names |= dict.fromkeys(name for name in metrics if not name.endswith(("_ci_low", "_ci_high")))
        for name, value in row.items():
            if name.endswith("_ci_low"):
                names[name.removesuffix("_ci_low")] = None
            elif isinstance(value, Mapping) and "ci_low" in value:
                names[name] = None
    return [name for name in names if name not in SPEED]


SPEED = ("seconds_to_first_token", "seconds_per_token", "tokens_per_second")
