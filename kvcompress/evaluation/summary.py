"""From samples to a cell: metrics, memory and time with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvcompress.evaluation.bootstrap import median_interval, ratio_interval, transformed
from kvcompress.evaluation.metrics import PERPLEXITY

_MEANS = ("retention", "held_tokens", "seen_tokens", "kv_bytes", "full_kv_bytes", "prompt_tokens")
_MEDIANS = ("seconds_to_first_token", "tokens_per_second")


def summarise(records: Sequence[dict[str, Any]], metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """Puts the samples of a cell together.

    Args:
        records: what each sample gave; at least one, none of them skipped.
        metrics: names in `METRICS`.
        seed: of the resampling.

    Returns:
        `metrics` with value, ci_low and ci_high of each; `by_kind` with the same for each kind of sample where there
        are several; means over samples of memory, medians of times, the largest peak; and `ci` with bounds of these.
    """
    found: dict[str, Any] = {"metrics": {name: _metric(records, name, seed) for name in metrics}}
    kinds = sorted({record["kind"] for record in records})
    if len(kinds) > 1:
        parts = {kind: [record for record in records if record["kind"] == kind] for kind in kinds}
        found["by_kind"] = {
            kind: {"samples": len(part), **{name: _metric(part, name, seed) for name in metrics}}
            for kind, part in parts.items()
        }
    bounds: dict[str, list[float]] = {}
    for name in (*_MEANS, *_MEDIANS):
        values = [record[name] for record in records if record.get(name) is not None]
        if not values:
            found[name] = None
            continue
        value, low, high = (
            ratio_interval(values, [1] * len(values), seed=seed)
            if name in _MEANS
            else median_interval(values, seed=seed)
        )
        found[name], bounds[name] = value, [low, high]
    peaks = [record["peak_bytes"] for record in records if record["peak_bytes"] is not None]
    return {**found, "peak_bytes": max(peaks, default=None), "ci": bounds}


def _metric(records: Sequence[dict[str, Any]], name: str, seed: int) -> dict[str, float]:
    if name == PERPLEXITY:
        nats, tokens = [r["nll"] for r in records], [r["answer_tokens"] for r in records]
        interval = transformed(_exp, ratio_interval(nats, tokens, seed=seed))
    else:
        interval = ratio_interval([record[name] for record in records], [1] * len(records), seed=seed)
    return dict(zip(("value", "ci_low", "ci_high"), interval, strict=True))


def _exp(mean: float) -> float:
    return math.exp(min(mean, 700.0))  # the largest that a float holds
