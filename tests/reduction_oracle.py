"""Reducing image tokens, token by token: loops over plain numbers, written from the definitions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests import tiny

Place = tuple[int, int, int] | None  # number of the grid, row, column; None for tokens of no grid


def band(place: int, length: int, bands: int) -> int:
    """Which of so many bands a place lies in, where the first ones take the remainder."""
    sizes = [length // bands + (1 if number < length % bands else 0) for number in range(bands)]
    return next(number for number, end in enumerate(accumulate(sizes)) if place < end)


def windows_of(places: Sequence[Place], sizes: Sequence[tuple[int, int]], across: int | None) -> list[list[int]]:
    """Tokens of every window, in order; None for one window a grid, however few tokens it has."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for number, (height, width) in enumerate(sizes):
        own = [token for token, place in enumerate(places) if place is not None and place[0] == number]
        if across is not None and len(own) < 8 * across**2:
            continue
        for token in own:
            _, row, column = places[token]  # type: ignore[misc]
            bands = across or 1
            found.setdefault((number, band(row, height, bands), band(column, width, bands)), []).append(token)
    return list(found.values())


def merged(count: int, rho: float) -> int:
    """Tokens of a window of `count` that are merged into others."""
    return min(math.floor(rho * count + 1e-6), count // 2)


def merge(
    hidden: Tensor, windows: list[list[int]], rho: float, weights: Sequence[float]
) -> tuple[dict[int, int], list[list[float]]]:
    """Steps 2, 3 and 5 of LightKV: what each removed token went into, and all states afterwards."""
    states = [[float(number) for number in state] for state in hidden]
    after, into = [list(state) for state in states], {}
    for window in windows:
        pairs = []
        for a in window[0::2]:
            divergences = [(1.0 - _cosine(states[a], states[b]), b) for b in window[1::2]]
            if divergences:
                pairs.append((*min(divergences), a))
        chosen = sorted(pairs, key=lambda pair: (pair[0], pair[2]))[: merged(len(window), rho)]
        for b in window[1::2]:
            sources = [b, *(a for _, other, a in chosen if other == b)]
            weight = [float(weights[source]) for source in sources]
            weight = weight if sum(weight) > 0 else [1.0] * len(sources)
            if len(sources) > 1:
                after[b] = [
                    sum(w * states[source][d] for w, source in zip(weight, sources, strict=True)) / sum(weight)
                    for d in range(len(states[b]))
                ]
        into |= {a: b for _, b, a in chosen}
    return into, after


def _cosine(one: list[float], other: list[float]) -> float:
    norm = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    return sum(x * y for x, y in zip(one, other, strict=True)) / norm


def guidance(query: Tensor, keys: Tensor, is_image: Sequence[bool], scale: float, over: str = "keys") -> list[float]:
    """Step 4 for one row: for each query's token, its attention to text, summed over heads; zero for text.

    Args:
        query: `[heads, queries, head_dim]` of the last tokens.
        keys: `[kv_heads, tokens, head_dim]` of all tokens.
        is_image: which tokens are images.
        scale: factor on the logits.
        over: what the softmax runs over, keys or all queries.
    """
    (heads, queries, _), (kv_heads, tokens) = query.shape, keys.shape[:2]
    first, found = tokens - queries, [0.0] * queries
    asking = [number for number in range(queries) if is_image[first + number]]
    for head in range(heads):
        logits = query[head].double() @ keys[head // (heads // kv_heads)].double().T * scale
        for token in range(tokens):
            if is_image[token]:
                continue
            for asked in asking:
                others = logits[asked] if over == "keys" else logits[:, token]
                found[asked] += float((logits[asked, token] - others.logsumexp(0)).exp())
    return found


@dataclass
class PlainLightKV:
    """A decoder with LightKV on one unpadded row, layer by layer, over transformers' DynamicCache.

    Attributes:
        model: a model that kvcompress never met.
        places: grid, row and column of every column.
        is_image: which positions hold image tokens.
        sizes: height and width of every grid.
        plan: windows along a side, by the number of layers that ran before.
        contiguous: whether the tokens of a layer are numbered anew.
        per_layer: whether decode steps go on from the number of tokens that each layer got.
        columns: columns that each layer got in the prompt.
    """

    model: PreTrainedModel
    places: list[Place]
    is_image: list[bool]
    sizes: list[tuple[int, int]]
    plan: dict[int, int]
    rho: float = 0.5
    contiguous: bool = False
    per_layer: bool = False
    over: str = "keys"
    columns: list[list[int]] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)

    def prefill(self, embedded: Tensor) -> tuple[list[int], Tensor]:
        """Columns that come out of the last layer, and their logits."""
        decoder, hidden, columns = self.model.get_decoder(), embedded, list(range(embedded.shape[1]))
        weights: list[float] = []
        for index, layer in enumerate(decoder.layers):
            if index in self.plan:
                hidden, columns = self._reduce(hidden, columns, weights, self.plan[index])
            self.columns.append(columns)
            positions = torch.arange(len(columns)) if self.contiguous else torch.tensor(columns)
            if index + 1 in self.plan:
                weights = self._guidance(layer, hidden, positions, columns)
            hidden = self._layer(layer, hidden, positions, torch.ones(len(columns), len(columns)).tril().bool())
        return columns, self.model.lm_head(decoder.norm(hidden))[0]

    def decode(self, token: int) -> Tensor:
        """Logits after one more token."""
        decoder, position = self.model.get_decoder(), torch.tensor([len(self.is_image)])
        hidden = decoder.embed_tokens(torch.tensor([[token]]))
        self.is_image.append(False)
        for index, layer in enumerate(decoder.layers):
            own = torch.tensor([self.cache.get_seq_length(index)]) if self.per_layer else position
            hidden = self._layer(layer, hidden, own, None)
        return self.model.lm_head(decoder.norm(hidden))[0, -1]

    def _layer(self, layer: torch.nn.Module, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        rotary = self.model.get_decoder().rotary_emb(hidden, position_ids=positions[None])
        mask = None if mask is None else mask[None, None]
        output: Tensor = layer(hidden, attention_mask=mask, **tiny.with_cache(self.cache), position_embeddings=rotary)
        return output

    def _guidance(self, layer: torch.nn.Module, hidden: Tensor, positions: Tensor, columns: list[int]) -> list[float]:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)[0]
        width = attention.head_dim
        angles = positions[:, None] * 10_000.0 ** -(torch.arange(0, width, 2) / width)
        turn = torch.polar(torch.ones_like(angles), angles)

        def heads(projection: torch.nn.Module) -> Tensor:
            real, imaginary = projection(normed).unflatten(-1, (-1, width)).transpose(0, 1).chunk(2, -1)
            turned = torch.complex(real, imaginary) * turn
            return torch.cat([turned.real, turned.imag], -1)

        images = [self.is_image[column] for column in columns]
        return guidance(heads(attention.q_proj), heads(attention.k_proj), images, width**-0.5, self.over)

    def _reduce(
        self, hidden: Tensor, columns: list[int], weights: list[float], across: int
    ) -> tuple[Tensor, list[int]]:
        windows = windows_of([self.places[column] for column in columns], self.sizes, across)
        into, states = merge(hidden[0], windows, self.rho, weights)
        stays = [token for token in range(len(columns)) if token not in into]
        return torch.tensor([[states[token] for token in stays]]), [columns[token] for token in stays]
