"""Laws of reducers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from kvcompress.errors import ConfigError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.testing.image_rows import Row, layer_of, reduced_by, reduction_of, rows
from kvcompress.testing.laws import Law, law, require, require_close, require_unchanged, tensors_of

_batches = st.tuples(st.lists(rows(largest=6), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def _reducer_law(
    draws: st.SearchStrategy[Any] = _batches, share: float = 1.0
) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law("reducer", draws=lambda reducer: draws, share=share)


def _shown(reducer: Reducer, drawn: tuple[list[Row], int]) -> tuple[list[Row], ReductionContext]:
    """The rows, and what the reducer sees of all of them at once."""
    batch, kv_heads = drawn
    batch = [replace(row, kv_heads=kv_heads) for row in batch]
    weights = reducer.guidance(layer_of(batch)) if reducer.reads_attention else None
    return batch, replace(reduction_of(batch), guidance=weights)


@_reducer_law(st.integers(1, 48), share=1 / 4)
def acts_at_ascending_layers(reducer: Reducer, layers: int) -> None:
    """The layers after which it acts are ascending whole numbers from 0 to less than there are; a decoder that has too
    few of them is refused with a ConfigError.
    """
    try:
        points = reducer.acts_after(layers)
    except ConfigError:
        return
    require(isinstance(points, tuple), f"returned {points!r}")
    require(sorted(set(points)) == list(points), f"returned {points} for {layers} layers")
    require(all(0 <= point < layers for point in points), f"returned {points} for {layers} layers")


@_reducer_law()
def gives_every_token_a_place(reducer: Reducer, drawn: tuple[list[Row], int]) -> None:
    """Each token goes on as itself, into one of its row that does, or is dropped (-1), and states keep shape and device
    and are finite.
    """
    _, seen = _shown(reducer, drawn)
    found = reducer.reduce(seen)
    require(isinstance(found, Reduced), f"returned {type(found).__name__}")
    require(found.into.shape == seen.index.shape and not found.into.is_floating_point(), "places of another shape")
    require(found.hidden.shape == seen.hidden.shape, f"states of the shape {tuple(found.hidden.shape)}")
    require(found.hidden.device == seen.hidden.device, f"states on {found.hidden.device}")
    require(found.hidden.isfinite(), "gave states that are not finite")
    for row, real in zip(found.into.tolist(), (seen.index >= 0).tolist(), strict=True):
        for token, into in enumerate(row):
            fits = not real[token] or into == -1 or (0 <= into < len(row) and row[into] == into and real[into])
            require(fits, f"token {token} goes into {into}, which does not go on")


@_reducer_law(st.tuples(_batches, _DTYPES))
def lets_text_go_on(reducer: Reducer, drawn: tuple[tuple[list[Row], int], torch.dtype]) -> None:
    """Text goes on as it is, bit for bit, and all states keep their dtype."""
    _, seen = _shown(reducer, drawn[0])
    seen = replace(seen, hidden=seen.hidden.to(drawn[1]))
    found, text = reducer.reduce(seen), ~seen.is_image & (seen.index >= 0)
    own = torch.arange(seen.index.shape[1]).expand_as(seen.index)
    require(found.hidden.dtype == drawn[1], f"gave {found.hidden.dtype} back for {drawn[1]}")
    require(torch.equal(found.into[text], own[text]), "text did not go on")
    require(torch.equal(found.hidden[text], seen.hidden[text]), "changed text")


@_reducer_law()
def reduces_rows_by_themselves(reducer: Reducer, drawn: tuple[list[Row], int]) -> None:
    """A row is reduced as it would be alone, beside rows with more or fewer tokens, grids and earlier turns, whatever
    stands in their padding.
    """
    batch, _ = _shown(reducer, drawn)
    together = reduced_by(reducer, batch)
    require(together.hidden.isfinite(), "gave states that are not finite")
    for number, row in enumerate(batch):
        alone, padding = row.by(reducer), together.into.shape[1] - len(row.grid)
        into = together.into[number, padding:]
        into = torch.where(into < 0, into, into - padding)
        require(torch.equal(into, alone.into[0]), f"row {number}: {into.tolist()}, alone {alone.into[0].tolist()}")
        stay = (alone.into[0] == torch.arange(len(row.grid))).nonzero().flatten()
        own = together.hidden[number, padding:][stay]
        require_close(own, alone.hidden[0, stay], 1e-5, f"states of row {number} are others alone")


@_reducer_law(share=1 / 4)
def leaves_the_tokens_alone(reducer: Reducer, drawn: tuple[list[Row], int]) -> None:
    """A reducer writes to no tensor that it is shown, neither of the layer nor of the tokens."""
    batch, seen = _shown(reducer, drawn)
    layer = layer_of(batch)
    before, before_layer = tensors_of(seen), tensors_of(layer)
    if reducer.reads_attention:
        reducer.guidance(layer)
    reducer.reduce(seen)
    require_unchanged(before, seen)
    require_unchanged(before_layer, layer)


@_reducer_law(share=1 / 4)
def reduces_alike(reducer: Reducer, drawn: tuple[list[Row], int]) -> None:
    """The same tokens are reduced alike, however often it is asked and whatever was drawn in between."""
    _, seen = _shown(reducer, drawn)
    first = reducer.reduce(seen)
    torch.rand(3)
    again = reducer.reduce(seen)
    real = seen.index >= 0
    require(torch.equal(first.into[real], again.into[real]), "reduced otherwise when it was asked again")
