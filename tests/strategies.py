"""Every registered policy, and configurations around it; what Hypothesis draws for them is in `kvcompress.testing`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from kvcompress import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS, CompressionConfig
from kvcompress.config.presets import PRESETS
from kvcompress.policies.base import Allocator, Evictor, Merger, Quantizer, Reducer, Scorer
from kvcompress.policies.registry import Registry
from kvcompress.testing.allocation import AllocationInput, allocation_inputs, for_layers
from kvcompress.testing.importance import MASSES, generator, seeds
from kvcompress.testing.merging import merge_contexts
from kvcompress.testing.selection import selection_contexts
from kvcompress.testing.variants import Scripted, choices, config_with, label, policy

__all__ = [
    "MASSES",
    "AllocationInput",
    "Scripted",
    "allocation_inputs",
    "config_with",
    "for_layers",
    "generator",
    "label",
    "merge_contexts",
    "policy",
    "seeds",
    "selection_contexts",
]

THOROUGH = settings.default.max_examples > 25  # pytest --hypothesis-profile=thorough


def examples(number: int) -> settings:
    """So many examples in the quick profile, and as many times more in another as it runs more of all."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 25))


# -- policies ----------------------------------------------------------------------------------------------------------

# Further variants of policies, beyond the combinations of their choices.
VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("scorer", "attention"): [
        {"queries": "window:4"},
        {"queries": "stride:3"},
        {"queries": "post_vision", "reduce": "mean", "image_weight": 0.5},
    ],
    ("scorer", "defensive"): [{"window": 3, "kernel": 3}, {"window": 1, "projected": False}],
    ("scorer", "expected_attention"): [{"future": 3, "epsilon": 0.02}, {"sink": 0}],
    ("scorer", "lagkv"): [{"lag": 4, "sink": 2}],
    ("scorer", "leverage"): [{"chunk": 4, "blend": 1.5}],
    ("scorer", "mixkv"): [{"window": 3, "kernel": 1}],
    ("scorer", "rkv"): [{"window": 3, "kernel": 1, "share": 0.6, "threshold": 0.2}],
    ("scorer", "snapkv"): [{"window": 3, "kernel": 3, "pool": "max"}, {"window": 1}],
    ("scorer", "value_aware"): [
        {"queries": "window:4", "reduce": "mean", "norm": "projected_l1", "epsilon": 1e-4},
        {"queries": "window:4", "norm": "largest_l1"},
    ],
    ("allocator", "profile"): [{"retention": None, "retentions": [[0.6, 0.2, 0.7], [0.3, 0, 0.3]]}],
    ("allocator", "prefix"): [{"even": 0.4}],
    ("allocator", "headprefix"): [{"even": 0.4}],
    ("allocator", "scores"): [{"safeguard": 0.3}],
    ("allocator", "adakv"): [{"safeguard": 0.0, "layers": "prefix"}, {"safeguard": 0.7, "layers": "entropy"}],
    ("evictor", "chunk"): [{"length": 3}],
    ("evictor", "every"): [{"period": 3}, {"granularity": "head", "period": 2, "window": 1}],
    ("evictor", "critical"): [{"first": 0.25, "epsilon": 0.1}],
    ("merger", "cam"): [{"reach": 3, "seed": 1}],
    ("merger", "lookm"): [
        {"rule": rule, "within_modality": False} for rule in ("average", "pivotal", "weighted", "mass")
    ],
    ("merger", "threshold"): [{"beta": 0.25, "decoding": False}],
}


@functools.cache
def variants(registry: Registry[Any]) -> tuple[Any, ...]:
    """Every registered policy of a stage with every combination of its choices (fields of Literal type), and more."""
    found = []
    for name in registry.names():
        found += choices(registry, name)
        found += [policy(registry, name, **more) for more in VARIANTS.get((registry.stage, name), [])]
    return tuple(found)


def allocators() -> tuple[Allocator, ...]:
    """Every registered allocator, for the three layers of the tiny models."""
    return variants(ALLOCATORS)


def evictors() -> tuple[Evictor, ...]:
    """Every registered evictor, in every granularity and with every decode rule."""
    return variants(EVICTORS)


def bounded_evictors() -> list[Evictor]:
    """Those that keep layers within their budget while decoding."""
    return [evictor for evictor in evictors() if getattr(evictor, "decode", None) != "none"]


def scorers() -> tuple[Scorer, ...]:
    """Every registered scorer with every choice it offers."""
    return variants(SCORERS)


def mergers() -> tuple[Merger, ...]:
    """Every registered merger with every choice it offers."""
    return variants(MERGERS)


def quantizers() -> tuple[Quantizer, ...]:
    """Every registered quantizer with every choice it offers."""
    return variants(QUANTIZERS)


def reducers() -> tuple[Reducer, ...]:
    """Every registered reducer with every choice it offers."""
    return variants(REDUCERS)


@functools.cache
def configs() -> tuple[Any, ...]:
    """Presets, and one configuration around every other policy; each with a test id."""
    return tuple(_configs())


def _configs() -> Iterator[Any]:
    for name in PRESETS:
        yield pytest.param(CompressionConfig.preset(name), id=f"preset-{name}")
    positions = itertools.cycle(("original", "contiguous", "per_layer"))
    fewer = [policy(REDUCERS, name, positions=next(positions)) for name in REDUCERS.names()]  # each runs an image model
    for given in (*scorers(), *allocators(), *evictors(), *mergers(), *quantizers(), *fewer):
        yield pytest.param(config_with(given), id=f"{given.stage}-{label(given)}")
