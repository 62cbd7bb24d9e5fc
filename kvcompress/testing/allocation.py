"""What allocators are given, as Hypothesis draws it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.statistics import STATISTICS
from kvcompress.testing.importance import MASSES, any_mass, dyadic_masses, generator, seeds


def for_layers(allocator: Allocator, layers: int) -> Allocator:
    """The same allocator for a model of so many layers: what it holds per layer is repeated or cut."""
    changed: dict[str, Any] = {}
    for name, value in allocator:
        if isinstance(value, Allocator):
            changed[name] = for_layers(value, layers)
        elif name in ("retention", "gates") and value:
            changed[name] = list(itertools.islice(itertools.cycle(value), layers))
        elif name == "retentions" and value:
            changed[name] = [list(itertools.islice(itertools.cycle(one), layers)) for one in value]
    return type(allocator)(**{**dict(allocator), **changed})


@dataclass(frozen=True)
class AllocationInput:
    """What an allocator is given."""

    importance: Tensor  # [layers, batch, tokens]
    total: Tensor  # [batch]
    floor: Tensor  # [layers, batch]
    capacity: Tensor  # [layers, batch]
    statistics: dict[str, Tensor] = field(default_factory=dict)  # [layers, batch]
    valid: Tensor | None = None  # [layers, batch, tokens]

    def context(self) -> AllocationContext:
        """A context without notes."""
        return AllocationContext(valid=self.valid, statistics=self.statistics)

    def with_heads(self) -> AllocationInput:
        """The same for an allocator of heads: some neighbouring layers are heads of one."""
        heads = next((count for count in (2, 3, 5, 7) if self.floor.shape[0] % count == 0), 1)

        def shaped(given: Tensor) -> Tensor:
            return given.reshape(len(given) // heads, heads, *given.shape[1:]).movedim(1, 2)

        return AllocationInput(
            shaped(self.importance),
            self.total,
            shaped(self.floor),
            shaped(self.capacity),
            {name: known[::heads] for name, known in self.statistics.items()},
            None if self.valid is None else shaped(self.valid),
        )

    def by(self, allocator: Allocator, **changed: Any) -> Tensor:
        """What an allocator, made for as many layers, gives for this, or for this with some of it changed.

        Heads count as layers: `[layers, batch]` whatever it sizes.
        """
        given = replace(self, **changed)
        if allocator.by_head:
            given = given.with_heads()
        own = for_layers(allocator, given.floor.shape[0])
        budget = own.allocate(given.importance, given.total, given.floor, given.capacity, given.context())
        return budget.movedim(2, 1).flatten(0, 1) if allocator.by_head else budget

    def rows(self, rows: slice) -> AllocationInput:
        """Some rows alone."""
        return AllocationInput(
            self.importance[:, rows],
            self.total[rows],
            self.floor[:, rows],
            self.capacity[:, rows],
            {name: known[:, rows] for name, known in self.statistics.items()},
            None if self.valid is None else self.valid[:, rows],
        )


@st.composite
def allocation_inputs(
    draw: st.DrawFn,
    kinds: st.SearchStrategy[str] = any_mass,
    max_layers: int = 6,
    max_batch: int = 3,
    max_tokens: int = 40,
    min_tokens: int = 1,
) -> AllocationInput:
    """Importance of a drawn kind with totals, floors and capacities, also totals that no allocation can meet."""
    layers, batch = draw(st.integers(1, max_layers)), draw(st.integers(1, max_batch))
    tokens, seed, kind = draw(st.integers(min_tokens, max_tokens)), draw(seeds), draw(kinds)
    g = generator(seed)
    importance = (
        dyadic_masses((layers, batch, tokens), g) if kind == "dyadic" else MASSES[kind]((layers, batch, tokens), g)
    )
    floor, capacity = draw(bounds(layers, batch, tokens, g))
    most = layers * tokens
    totals = st.integers(0, most) | st.integers(-3, most + 3) | st.sampled_from([0, 1, most, 2**40])
    total = torch.tensor([draw(totals) for _ in range(batch)])
    return AllocationInput(importance, total, floor, capacity, draw(statistics(layers, batch, g)))


@st.composite
def statistics(draw: st.DrawFn, layers: int, batch: int, g: torch.Generator) -> dict[str, Tensor]:
    """A value of every known statistic, from 0 to 1: random, equal, or none."""
    kinds = {
        "random": torch.rand(layers, batch, generator=g),
        "equal": torch.full((layers, batch), 0.3),
        "zeros": torch.zeros(layers, batch),
    }
    return {name: kinds[draw(st.sampled_from(sorted(kinds)))] for name in STATISTICS}


@st.composite
def bounds(draw: st.DrawFn, layers: int, batch: int, tokens: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Floors and capacities: none, the same everywhere, or random."""
    capacity = torch.full((layers, batch), tokens)
    if draw(st.booleans()):
        capacity = torch.randint(0, tokens + 1, (layers, batch), generator=g)
    floor = torch.zeros(layers, batch, dtype=torch.long)
    kind = draw(st.sampled_from(["none", "same", "random"]))
    if kind == "same":
        floor = torch.minimum(floor + draw(st.integers(0, tokens)), capacity)
    elif kind == "random":
        floor = (torch.rand(layers, batch, generator=g) * (capacity + 1)).long().clamp(max=capacity)
    return floor, capacity
