"""Registered policies with every choice they offer, and configurations around one policy."""

from __future__ import annotations

import functools
import itertools
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor

from kvcompress.config import CompressionConfig
from kvcompress.config.composition import EXAMPLES
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Policy, Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import ALLOCATORS, EVICTORS, SCORERS, Registry
from kvcompress.testing.importance import generator


def policy(registry: Registry[Any], name: str, **fields: Any) -> Any:
    """A registered policy, with example values for the fields that it demands."""
    return registry.create(name, **{**EXAMPLES.get((registry.stage, name), {}), **fields})


def choices(registry: Registry[Any], name: str) -> list[Any]:
    """A registered policy with every combination of its choices (fields of Literal type)."""
    fields = registry.get(name).model_fields
    offered = {key: get_args(f.annotation) for key, f in fields.items() if get_origin(f.annotation) is Literal}
    return [
        policy(registry, name, **dict(zip(offered, values, strict=True)))
        for values in itertools.product(*offered.values())
    ]


@functools.cache
def _every(registry: Registry[Any]) -> tuple[Any, ...]:
    return tuple(one for name in registry.names() for one in choices(registry, name))


def label(given: Any) -> str:
    """A readable test id of a policy."""
    return "none" if given is None else f"{given.name}-{'-'.join(str(v) for _, v in given)}".rstrip("-")


def _compatible(**fields: Any) -> CompressionConfig | None:
    try:
        return CompressionConfig(**fields)
    except ConfigError:
        return None


def config_with(given: Policy, **fields: Any) -> CompressionConfig:
    """A valid configuration around one policy: the first neighbours that go with it."""
    mine = {given.stage: given}
    for scorer, allocator, evictor in itertools.product(
        [*_every(SCORERS), None],
        [policy(ALLOCATORS, "uniform"), *_every(ALLOCATORS)],
        [policy(EVICTORS, "topk"), *_every(EVICTORS)],
    ):
        around = {"scorer": scorer, "allocator": allocator, "evictor": evictor, **mine, **fields}
        config = _compatible(**around)
        if config is not None:
            return config
    raise ConfigError(f"{given.stage} {given.name}: no registered scorer, allocator and evictor go with it")


class Scripted(Scorer):
    """Scores that follow from layer, head and the number of tokens before alone, so that plain lists can know them."""

    name: ClassVar[str] = "scripted"
    mass: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    seed: int = 0
    highest: int = 2**20  # sums of a few are exact in float32, and equal shares of two layers unlikely

    def table(self, layer: int, heads: int, tokens: int) -> Tensor:
        """Scores `[heads, tokens]`."""
        rows = [
            torch.randint(1, self.highest, (512,), generator=generator(self.seed + 64 * layer + head))
            for head in range(heads)
        ]
        return torch.stack(rows)[:, :tokens].float()

    def at(self, layer: int, head: int, index: int) -> int:
        """Score of one token."""
        return _scripted_row(self.seed, self.highest, layer, head)[index]

    def score(self, layer: LayerContext) -> Importance:
        """Looks the scores up."""
        batch, heads, tokens = layer.keys.shape[:3]
        index = layer.index.long().clamp(min=0).expand(batch, heads, tokens)
        return self.table(layer.layer, heads, 512).expand(batch, -1, -1).gather(-1, index)


@functools.cache
def _scripted_row(seed: int, highest: int, layer: int, head: int) -> list[int]:
    return Scripted(seed=seed, highest=highest).table(layer, head + 1, 512)[head].int().tolist()
