"""Ways to compress that suites of the grid share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.grid_readings import BUDGETS, Way
from kvcompress import CompressionConfig

LARGER = (0.2, 0.3, 0.5)
WIDE = (0.1, 0.3, 0.5)
TEXT = {"fraction": 0.2, "sink": 4, "recent": 32}
IMAGE = {"fraction": 0.2, "sink": 1, "recent": 1}
ON_TOP = {"protected": "on_top"}
SHARED: dict[str, Any] = {
    "uniform": "uniform",
    "prefix": {"name": "prefix", **ON_TOP},
    "headprefix": {"name": "headprefix", **ON_TOP},
    "adakv": "adakv",
}
OF_LAYERS = {name: SHARED[name] for name in ("uniform", "prefix")}
EVEN: dict[str, Any] = {"prefix, half even": {"name": "prefix", **ON_TOP, "even": 0.5}}
LAYER: dict[str, Any] = {"name": "topk", "granularity": "layer", "decode": "oldest"}
HEAD: dict[str, Any] = {"name": "topk", "granularity": "head", "decode": "oldest"}
RUNS: dict[str, Any] = {"name": "chunk", "length": 12, "granularity": "head", "decode": "oldest"}
WINDOW = {"name": "snapkv", "window": 16}


def ways(
    budget: dict[str, Any],
    scorer: Any,
    shared: dict[str, Any],
    budgets: Sequence[float] = BUDGETS,
    evictor: dict[str, Any] = HEAD,
) -> dict[str, Way]:
    """One scorer with several ways to share a budget; heads choose their own tokens, one by one, unless told."""
    found = {}
    for name, allocator in shared.items():
        config = CompressionConfig.model_validate(
            {"budget": budget, "scorer": scorer, "allocator": allocator, "evictor": evictor}
        )
        found[name] = Way(config, budgets)
    return found


def presets(*names: str) -> dict[str, Way]:
    """Presets as they are."""
    return {name: Way(CompressionConfig.preset(name), LARGER) for name in names}


def merged() -> dict[str, Way]:
    """The preset for images, which merges by mass, and the same with plain averages."""
    average = CompressionConfig.preset("image", merger="lookm")
    return {**presets("image"), "image, averages": Way(average, LARGER)}
