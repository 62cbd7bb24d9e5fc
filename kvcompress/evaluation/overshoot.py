"""Caches that held more than their budget: what protected tokens, or a decode rule that evicts nothing, bring about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.errors import BudgetWarning

_TOLERANCE = 1.05  # times the budget, and a token: what rounding explains
_NAMED = 3


def warn_of_overshoots(rows: Sequence[Mapping[str, Any]]) -> None:
    """Warns once, in tokens, where caches of a grid held more than their budgets and so are not to be compared by them.

    Args:
        rows: results as `evaluate` gives them; one that does not tell what it held counts as within.
    """
    found = [text for row in rows if (text := _overshoot(row)) is not None]
    if found:
        named = "; ".join(found[:_NAMED]) + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        warnings.warn(
            f"{len(found)} of {len(rows)} caches held more than their budget: {named}. "
            "Compare caches by what they held, as tables and pictures do",
            BudgetWarning,
            stacklevel=3,
        )


def _overshoot(row: Mapping[str, Any]) -> str | None:
    """What a cache held and what it was allowed, in tokens per layer; None if that is within."""
    held, seen, budget = row.get("held_tokens"), row.get("seen_tokens"), row["budget"]
    if held is None or seen is None or row["config"] is None:
        return None
    allowed = {
        "fraction": budget * seen,
        "tokens": budget,
        "bytes": held * budget / max(1, row["kv_bytes"]),
    }[row["budget_unit"]]
    if held <= _TOLERANCE * allowed + 1:
        return None
    return f"{row['cell']} held {held:,.0f} of {seen:,.0f} tokens per layer, where its budget is {allowed:,.0f}"
