"""Which policies of different stages go together, found by asking the configuration itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from kvcompress.config.budget import Budget
from kvcompress.config.compression import CompressionConfig
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Policy
from kvcompress.policies.registry import REGISTRIES, Registry

_STAGES: dict[str, Registry[Any]] = {r.stage: r for r in REGISTRIES}
NEIGHBOURS = (
    ("scorer", "allocator"),
    ("scorer", "evictor"),
    ("allocator", "evictor"),
    ("scorer", "merger"),
    ("evictor", "merger"),
    ("evictor", "quantizer"),
    ("merger", "quantizer"),
    *((stage, "reducer") for stage in ("scorer", "allocator", "evictor", "merger", "quantizer")),
)
# What a policy is given that cannot be made from its name alone.
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("allocator", "duo"): {"gates": [[0.9], [0.1], [0.5]], "streaming": 4},
    ("allocator", "profile"): {"retention": [0.6, 0.1, 0.35]},  # as many layers as the models of the tests have
    ("reducer", "lightkv"): {"windows": [2, 1]},  # which the small images of the tests have enough tokens for
}
# What stands in the stages that a pair leaves open, in the order in which it is tried.
_AROUND: dict[str, list[Any]] = {
    "scorer": ["attention", None],
    "allocator": ["uniform", "prefix"],
    "evictor": ["topk", "streaming"],
    "merger": [None],
    "quantizer": [None],
    "reducer": [None],
}


@dataclass(frozen=True)
class Pair:
    """Two policies and what comes of them.

    Attributes:
        stages: their stages.
        labels: their names, with the decode rule where there are several.
        config: the first configuration around them that is valid; None if there is none.
        reason: why there is none.
    """

    stages: tuple[str, str]
    labels: tuple[str, str]
    config: CompressionConfig | None
    reason: str = ""


def policies_of(stage: str) -> Iterator[tuple[str, Policy]]:
    """Every registered policy of a stage with its label; evictors once for each decode rule."""
    registry = _STAGES[stage]
    for name in registry.names():
        fields = EXAMPLES.get((stage, name), {})
        rule = registry.get(name).model_fields.get("decode")
        rules = get_args(rule.annotation) if stage == "evictor" and rule is not None else ()
        for decode in rules:
            yield f"{name}, {decode}", registry.create(name, decode=decode, **fields)
        if not rules:
            yield name, registry.create(name, **fields)


def pairs(first: str, second: str) -> Iterator[Pair]:
    """Every pair of policies of two stages."""
    for (label, policy), (other_label, other) in itertools.product(policies_of(first), policies_of(second)):
        config, reason = _around({first: policy, second: other})
        yield Pair((first, second), (label, other_label), config, reason)


def _around(given: dict[str, Policy]) -> tuple[CompressionConfig | None, str]:
    """The first valid configuration with these policies, or the reason that the most usual one is refused for."""
    reason = ""
    choices = [[given[stage]] if stage in given else others for stage, others in _AROUND.items()]
    for values in itertools.product(*choices):
        try:
            return CompressionConfig(budget=Budget(fraction=0.5), **dict(zip(_AROUND, values, strict=True))), ""
        except ConfigError as error:
            reason = reason or str(error)
    return None, reason


def as_markdown() -> str:
    """The page of the documentation: a table for each two neighbouring stages, and the reasons for what is refused."""
    parts = [_INTRODUCTION]
    for first, second in NEIGHBOURS:
        found = list(pairs(first, second))
        reasons = list(dict.fromkeys(_reason(pair) for pair in found if pair.config is None))
        columns = list(dict.fromkeys(pair.labels[1] for pair in found))
        parts.append(f"## {first.capitalize()} and {second}\n")
        parts.append(f"| | {' | '.join(f'`{column}`' for column in columns)} |")
        parts.append(f"|---|{'---|' * len(columns)}")
        for label, row in itertools.groupby(found, key=lambda pair: pair.labels[0]):
            cells = ["yes" if pair.config else f"({reasons.index(_reason(pair)) + 1})" for pair in row]
            parts.append(f"| `{label}` | {' | '.join(cells)} |")
        parts += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""] if reasons else [""]
    return "\n".join(parts)


def _reason(pair: Pair) -> str:
    """Why a pair is refused, without the names that the table gives."""
    reason = pair.reason
    for stage, label in zip(pair.stages, pair.labels, strict=True):
        reason = reason.replace(f"{stage} {label.split(',')[0]}", stage)
    return reason


def presets_as_markdown() -> str:
    """The page of the presets: each with what it is and the fields it sets."""
    parts = [_PRESETS_INTRODUCTION]
    for name, (summary, fields) in PRESETS.items():
        parts += [f"## {name}\n", f"{summary}\n", "```yaml", yaml.safe_dump(fields, sort_keys=False).rstrip(), "```\n"]
    return "\n".join(parts)


_PRESETS_INTRODUCTION = """# Presets

This page is written by `python tools/composition.py`. A preset is a configuration with a name, any field of which can
be overridden: `CompressedCache(model, "snapkv", budget=0.3, merger="lookm")`. The [benchmarks](../benchmarks.md)
compare them on plain text.
"""
_INTRODUCTION = """# What goes with what

This page is written by `python tools/composition.py`, which asks the configuration about every pair of policies of
neighbouring stages: "yes" means that some configuration with both is valid (and each of these runs on a small LLaMA and
a small LLaVA in the tests), a number is the reason why none is. Three or more policies go together when each two do.
"""
