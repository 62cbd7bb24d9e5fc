"""Rows of text and images as reducers meet them: drawn, alone or side by side with padding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.context import LayerContext, Reduced, ReductionContext, TowerView
from kvcompress.policies.images import ImageGrid, ImageLayout
from kvcompress.testing.importance import generator, seeds


@dataclass
class Row:
    """A row of text and images between two layers, and the attention of the first of them."""

    grids: list[tuple[int, int, int]]  # number of the image, height, width
    grid: list[int]
    cell: list[tuple[int, int]]
    image: list[bool]
    past: list[bool]  # which tokens of earlier turns were images
    kv_heads: int
    gone: int  # image tokens that there were once
    seed: int

    @cached_property
    def hidden(self) -> Tensor:
        """States of its tokens."""
        return torch.randn(len(self.grid), 6, generator=generator(self.seed))

    @cached_property
    def tower(self) -> Tensor:
        """Attention that the vision tower gives its tokens, then their keys there."""
        drawn = torch.randn(len(self.grid), 5, generator=generator(self.seed + 2))
        return torch.cat([drawn[:, :1].abs(), drawn[:, 1:]], 1) * torch.tensor(self.image).unsqueeze(1)

    @cached_property
    def row(self) -> ReductionContext:
        """This row alone."""
        return reduction_of([self])

    @cached_property
    def layer(self) -> LayerContext:
        """The layer's attention to this row alone."""
        return layer_of([self])

    @property
    def places(self) -> list[tuple[int, int, int] | None]:
        """Grid, row and column of each token; None for text and for image tokens of no grid."""
        return [None if number < 0 else (number, *cell) for number, cell in zip(self.grid, self.cell, strict=True)]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each grid."""
        return [(height, width) for _, height, width in self.grids]

    def by(self, reducer: Any) -> Reduced:
        """What a reducer makes of it, guided by the layer."""
        return reduced_by(reducer, [self])


def reduced_by(reducer: Any, drawn: list[Row]) -> Reduced:
    """What a reducer makes of rows side by side, guided by the layer."""
    weights = reducer.guidance(layer_of(drawn)) if reducer.reads_attention else None
    found: Reduced = reducer.reduce(replace(reduction_of(drawn), guidance=weights))
    return found


def side_by_side(parts: list[Tensor], noise: int | None = None) -> Tensor:
    """Rows as a batch, each with its padding first: blanks, or numbers that mean nothing."""
    longest = max(map(len, parts))
    found = torch.full((len(parts), longest, *parts[0].shape[1:]), -1, dtype=parts[0].dtype)
    if noise is not None:
        found = torch.randn(found.shape, generator=generator(noise)) * 3
    for row, part in zip(found, parts, strict=True):
        row[longest - len(part) :] = part
    return found


def reduction_of(drawn: list[Row]) -> ReductionContext:
    """Rows side by side between two layers."""
    facts = [torch.tensor([row.grid, row.image]).T for row in drawn]
    sizes = [torch.tensor([(-1, -1), *(grid[1:] for grid in row.grids)])[torch.tensor(row.grid) + 1] for row in drawn]
    grid, is_image = side_by_side(facts).unbind(-1)
    return ReductionContext(
        stage=0,
        layer=1,
        hidden=side_by_side([row.hidden for row in drawn], noise=1),
        index=side_by_side([len(row.past) + torch.arange(len(row.grid)) for row in drawn]),
        is_image=is_image == 1,
        grids=[[ImageGrid(*grid) for grid in row.grids] for row in drawn],
        grid=grid,
        cell=side_by_side([torch.tensor(row.cell) for row in drawn]),
        size=side_by_side(sizes),
        image_tokens=[sum(row.image) + row.gone for row in drawn],
        tower=TowerView(
            side_by_side([row.tower[:, 0] for row in drawn], noise=2), side_by_side([row.tower[:, 1:] for row in drawn])
        ),
    )


def layer_of(drawn: list[Row]) -> LayerContext:
    """Rows side by side in the layer before, with what is left of earlier turns."""
    query, keys, facts = [], [], []
    for row in drawn:
        new, tokens, g = len(row.grid), len(row.past) + len(row.grid), generator(row.seed + 1)
        keys.append(torch.randn(row.kv_heads, tokens, 4, generator=g).transpose(0, 1) * 2)
        query.append(torch.randn(4, new, 4, generator=g).transpose(0, 1))
        facts.append(torch.tensor([[*row.past, *row.image], range(tokens)]).T)

    def slots(parts: list[Tensor], noise: int | None = None) -> Tensor:
        """What there was before, and what is new, each with its padding first."""
        both = [
            side_by_side([part[: len(row.past)] for part, row in zip(parts, drawn, strict=True)], noise),
            side_by_side([part[len(row.past) :] for part, row in zip(parts, drawn, strict=True)], noise),
        ]
        return torch.cat(both, 1)

    is_image, index = slots(facts).unbind(-1)
    key = slots(keys, noise=3).transpose(1, 2)
    return LayerContext(
        layer=1,
        query=side_by_side(query, noise=2).transpose(1, 2),
        keys=key,
        values=key,
        lse=None,
        scaling=0.5,
        index=index.unsqueeze(1),
        seen=torch.tensor(list(map(len, facts))),
        valid=None if len(drawn) == 1 else (index >= 0).unsqueeze(1),
        is_image=(is_image == 1).unsqueeze(1),
    )


@st.composite
def rows(draw: st.DrawFn, largest: int = 10) -> Row:
    """Text, grids of any size with tokens of no grid between them, some of which have gone already."""
    seed = draw(seeds)
    g = generator(seed + 2)
    sizes = draw(st.lists(st.tuples(st.integers(1, largest), st.integers(1, largest)), min_size=1, max_size=3))
    left = draw(st.sampled_from([1.0, 0.7, 0.3]))
    found = Row([], [], [], [], draw(st.lists(st.booleans(), max_size=3)), draw(st.sampled_from([1, 2, 4])), 0, seed)

    def add(grid: int, cell: tuple[int, int], image: bool, count: int = 1) -> None:
        found.grid.extend([grid] * count)
        found.cell.extend([cell] * count)
        found.image.extend([image] * count)

    number = 0
    for index, (height, width) in enumerate(sizes):
        number += index > 0 and draw(st.booleans())
        found.grids.append((number, height, width))
        add(-1, (-1, -1), False, draw(st.integers(0, 3)) + (index == 0))
        for place in itertools.product(range(height), range(width)):
            if float(torch.rand((), generator=g)) < left:
                add(index, place, True)
        add(-1, (-1, -1), True, draw(st.integers(0, 1)) or not any(found.image))
    found.gone = draw(st.integers(0, 20))
    return found


def layout_of(drawn: list[Row]) -> ImageLayout:
    """Where their images are."""
    found = reduction_of(drawn)
    return ImageLayout(found.grids, [sum(row.image) for row in drawn], found.grid, found.cell, found.size)
