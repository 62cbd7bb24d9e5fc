"""What scorers see of a layer, as Hypothesis draws it: alone, and as rows of a padded batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.testing.importance import generator, seeds

DIM, HIDDEN = 8, 24


def context(
    seed: int,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 6,
    past: int = 3,
    images: bool = True,
    rotary: bool = True,
    dtype: torch.dtype = torch.float32,
) -> LayerContext:
    """One layer with gaps between its older slots, rows of different lengths, images here and there."""
    g, tokens, heads = generator(seed), past + queries, kv_heads * group
    query = torch.randn(batch, heads, queries, DIM, generator=g) * 1.5
    keys, values = (torch.randn(batch, kv_heads, tokens, DIM, generator=g) * 1.5 for _ in range(2))
    gaps = torch.randint(1, 4, (batch, 1, tokens), generator=g)
    gaps[..., past + 1 :] = 1
    index = gaps.cumsum(-1) - 1
    scaling = 0.3
    logits = query.double() @ keys.repeat_interleave(group, 1).double().transpose(2, 3) * scaling
    lse = logits.masked_fill(~visible(queries, tokens), -torch.inf).logsumexp(-1)
    return LayerContext(
        layer=int(torch.randint(0, 9, (), generator=g)),
        query=query.to(dtype),
        keys=keys.to(dtype),
        values=values.to(dtype),
        lse=lse.float(),
        scaling=scaling,
        index=index,
        seen=index[:, 0, -1] + 1,
        is_image=torch.rand(batch, 1, tokens, generator=g) < 0.3 if images else None,
        weights=LayerWeights(
            torch.randn(HIDDEN, heads * DIM, generator=g).to(dtype),
            0.7 ** torch.arange(1, DIM // 2 + 1) if rotary else None,
        ),
    )


def visible(queries: int, tokens: int) -> Tensor:
    """Which tokens each of the last queries sees."""
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Rows of different lengths as one batch, and alone.

    Attributes:
        batch: all rows, with padding among the forward's tokens and empty slots after the older ones.
        alone: each row without them.
        slots: where in the batch each row's slots are.
    """

    batch: LayerContext
    alone: list[LayerContext]
    slots: list[list[int]]

    def of_row(self, score: Tensor, row: int) -> Tensor:
        """What the batch's scores say of a row's own slots."""
        return score[row : row + 1, :, self.slots[row]]


def padded(seed: int, rows: list[tuple[int, int]], kv_heads: int, group: int, images: bool, rotary: bool) -> Padded:
    """Rows of so many older slots, in any order, and so many queries; whatever stands where no token is."""
    g, layer = generator(seed), seed % 7
    past, queries = (max(column) for column in zip(*rows, strict=True))
    weights = context(seed, kv_heads=kv_heads, group=group, rotary=rotary).weights
    alone, slots = [], []
    for number, (own_past, own_queries) in enumerate(rows):
        row = context(seed + number, 1, kv_heads, group, own_queries, own_past, images, rotary)
        order = torch.cat([torch.randperm(own_past, generator=g), torch.arange(own_past, own_past + own_queries)])
        moved: dict[str, Any] = {name: getattr(row, name)[:, :, order] for name in ("keys", "values", "index")}
        if row.is_image is not None:
            moved["is_image"] = row.is_image[:, :, order]
        alone.append(dataclasses.replace(row, layer=layer, weights=weights, **moved))
        slots.append([*range(own_past), *range(past + queries - own_queries, past + queries)])
    shape, tokens = (len(rows), kv_heads), past + queries
    filled: dict[str, Any] = {
        "query": torch.randn(len(rows), kv_heads * group, queries, DIM, generator=g) * 9,
        "keys": torch.randn(*shape, tokens, DIM, generator=g) * 9,
        "values": torch.randn(*shape, tokens, DIM, generator=g) * 9,
        "lse": torch.full((len(rows), kv_heads * group, queries), -torch.inf),
        "index": torch.full((len(rows), 1, tokens), -1),
        "valid": torch.zeros(len(rows), 1, tokens, dtype=torch.bool),
    }
    if images:
        filled["is_image"] = torch.zeros(len(rows), 1, tokens, dtype=torch.bool)
    for number, row in enumerate(alone):
        for name, tensor in filled.items():
            if name in ("query", "lse"):
                tensor[number, :, queries - row.query.shape[2] :] = getattr(row, name)[0]
            else:
                tensor[number, :, slots[number]] = True if name == "valid" else getattr(row, name)[0]
    seen = torch.cat([row.seen for row in alone])
    batch = dataclasses.replace(alone[0], **filled, seen=seen)
    return Padded(batch, alone, slots)


padded_batches = st.builds(
    padded,
    seed=seeds,
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 14)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    images=st.booleans(),
    rotary=st.booleans(),
)

contexts = st.builds(
    context,
    seed=seeds,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 14),
    past=st.integers(0, 9),
    images=st.booleans(),
    rotary=st.booleans(),
)
