"""Laws of mergers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.testing.importance import generator, seeds
from kvcompress.testing.laws import Law, law, require, require_close, require_unchanged, tensors_of
from kvcompress.testing.merging import merge_contexts

_HALVES = (torch.bfloat16, torch.float16)


def _merger_law(draws: st.SearchStrategy[Any], share: float = 1.0) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law("merger", draws=lambda merger: draws, share=share)


def require_same(found: Merged, wanted: Merged, where: Tensor, says: str, tolerance: float = 2e-6) -> None:
    """Raises unless two results agree on some slots, and on the state."""
    require_close(found.keys[where], wanted.keys[where], tolerance, f"{says}: keys")
    require_close(found.values[where], wanted.values[where], tolerance, f"{says}: values")
    if found.state is not None and wanted.state is not None:
        require_close(found.state, wanted.state, tolerance, f"{says}: state")
    else:
        require(found.state is wanted.state, f"{says}: a state in one case alone")


def _picked(layer: MergeContext, axis: int, index: Tensor) -> MergeContext:
    """The same layer with rows (axis 0) or slots (axis 2) picked in another order."""
    picked: dict[str, Any] = {
        name: value.index_select(axis, index)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and value.ndim > axis
    }
    return replace(layer, **picked)


@_merger_law(merge_contexts(), share=1 / 4)
def gives_back_what_it_got(merger: Merger, layer: MergeContext) -> None:
    """Merged keys and values have the shapes, dtypes and device they came in, and are finite where slots are kept."""
    merged = merger.merge(layer)
    for name in ("keys", "values"):
        found, given = getattr(merged, name), getattr(layer, name)
        require(
            found.shape == given.shape and found.dtype == given.dtype and found.device == given.device,
            lambda n=name, f=found: f"returned {n} as {f.dtype} of {tuple(f.shape)}",  # type: ignore[misc]
        )
        require(found[layer.kept].isfinite(), f"returned {name} that are not finite")


@_merger_law(merge_contexts())
def changes_nothing_without_evicted_slots(merger: Merger, layer: MergeContext) -> None:
    """Where no slot is evicted, every kept one is bit for bit what it was."""
    layer = replace(layer, evicted=torch.zeros_like(layer.evicted))
    merged = merger.merge(layer)
    require(torch.equal(merged.keys[layer.kept], layer.keys[layer.kept]), "changed keys")
    require(torch.equal(merged.values[layer.kept], layer.values[layer.kept]), "changed values")


@_merger_law(merge_contexts(), share=1 / 4)
def leaves_the_layer_alone(merger: Merger, layer: MergeContext) -> None:
    """A merger writes to no tensor of its layer."""
    before = tensors_of(layer)
    merger.merge(layer)
    require_unchanged(before, layer)


@_merger_law(merge_contexts(), share=1 / 4)
def merges_alike(merger: Merger, layer: MergeContext) -> None:
    """The same layer is merged alike, however often it is asked and whatever was drawn in between."""
    first = merger.merge(layer)
    torch.rand(3)
    require_same(merger.merge(layer), first, layer.kept, "merged otherwise when it was asked again", 0.0)


@_merger_law(st.tuples(merge_contexts(), seeds))
def ignores_the_order_of_rows_and_slots(merger: Merger, drawn: tuple[MergeContext, int]) -> None:
    """Rows that are permuted give permuted rows, and so do slots, whose order in a buffer means nothing."""
    layer, seed = drawn
    merged = merger.merge(layer)
    for axis, what in ((0, "rows"), (2, "slots")):
        order = torch.randperm(layer.kept.shape[axis], generator=generator(seed))
        other = _picked(layer, axis, order)
        state = merged.state if merged.state is None or axis else merged.state[order]
        wanted = Merged(merged.keys.index_select(axis, order), merged.values.index_select(axis, order), state)
        require_same(merger.merge(other), wanted, other.kept, f"{what} in another order")


@_merger_law(st.tuples(merge_contexts(), seeds))
def ignores_empty_slots(merger: Merger, drawn: tuple[MergeContext, int]) -> None:
    """A layer with more empty slots, whatever lies in them, merges as before."""
    layer, seed = drawn
    batch, heads, slots = layer.kept.shape
    place = torch.randperm(slots + 3, generator=generator(seed))[:slots]

    def spread(tensor: Tensor, fill: float | bool) -> Tensor:
        wide = torch.full((batch, heads, slots + 3, *tensor.shape[3:]), fill, dtype=tensor.dtype)
        return wide.index_copy(2, place, tensor)

    wide = replace(
        layer,
        keys=spread(layer.keys, 1e4),
        values=spread(layer.values, 1e4),
        kept=spread(layer.kept, False),
        evicted=spread(layer.evicted, False),
        index=spread(layer.index, -1),
        importance=None if layer.importance is None else spread(layer.importance, 1e4),
        is_image=None if layer.is_image is None else spread(layer.is_image, False),
    )
    merged, found = merger.merge(layer), merger.merge(wide)
    found = Merged(found.keys.index_select(2, place), found.values.index_select(2, place), found.state)
    require_same(found, merged, layer.kept, "with more empty slots")


@_merger_law(st.tuples(merge_contexts(), seeds))
def merges_heads_and_rows_by_themselves(merger: Merger, drawn: tuple[MergeContext, int]) -> None:
    """What one head of one row holds has no effect on any other."""
    layer, seed = drawn
    batch, heads, slots = layer.kept.shape
    row, head = (int(torch.randint(0, most, (), generator=generator(seed))) for most in (batch, heads))
    own: dict[str, Any] = {name: value.clone() for name, value in vars(layer).items() if isinstance(value, Tensor)}
    for name in {"keys", "values", "importance"} & set(own):
        own[name][row, head] = own[name][row, head].flip(0) * 3
    own["evicted"][row, head] = own["kept"][row, head] | own["evicted"][row, head]
    own["kept"][row, head] = False
    where = layer.kept.clone()
    where[row, head] = False
    merged, found = merger.merge(layer), merger.merge(replace(layer, **own, most_evicted=slots))
    require_same(Merged(found.keys, found.values), Merged(merged.keys, merged.values), where, "another head changed")


@_merger_law(st.one_of(*(st.tuples(merge_contexts(dtype=dtype), st.just(dtype)) for dtype in _HALVES)))
def rounds_half_precision_once(merger: Merger, drawn: tuple[MergeContext, torch.dtype]) -> None:
    """Sums of half precision are those of float32, and only the result is rounded."""
    layer, dtype = drawn
    merged = merger.merge(layer)
    exact = merger.merge(replace(layer, keys=layer.keys.float(), values=layer.values.float()))
    require(merged.keys.dtype == dtype and merged.values.dtype == dtype, lambda: f"returned {merged.keys.dtype}")
    for name in ("keys", "values"):
        found, wanted = getattr(merged, name)[layer.kept], getattr(exact, name)[layer.kept].to(dtype)
        require(torch.equal(found, wanted), f"rounded {name} more than once")
