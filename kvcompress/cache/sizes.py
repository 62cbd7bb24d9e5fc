"""Why a cache takes more bytes than its budget speaks of, in words."""

from __future__ import annotations

import numpy as np

from kvcompress.cache.allocation import protection
from kvcompress.cache.state import CacheState
from kvcompress.markup import size


def explained(state: CacheState, held: np.ndarray) -> list[str]:
    """What stands beside the tokens that a budget counts, or takes more than it says; nothing where nothing does.

    Args:
        state: of the cache.
        held: tokens that each layer holds per row, `[layers, batch]`.
    """
    if not held.size or not state.layers[0].store.slot_nbytes:
        return []
    return [note for note in (_protected(state, held), _room(state, held), *_kept_beside(state, held)) if note]


def _protected(state: CacheState, held: np.ndarray) -> str:
    """Sinks and recents that are more than the budget."""
    totals = state.rule.totals(state.sequence.row_seen)
    over = int(np.maximum(0, held.sum(0) - totals).sum())
    if state.config.evictor is None or state.config.evictor.frees == "nothing" or state.recording or not over:
        return ""
    sinks, recents = protection(state.config)
    return (
        f"the first {sinks} and last {recents} tokens stay in every layer whatever the budget: over all layers "
        f"{over:,} tokens more than it says"
    )


def _room(state: CacheState, held: np.ndarray) -> str:
    """Slots without a token, where they take the cache over what its tokens may take."""
    limits = state.limits()
    allowed = (held if limits is None else np.maximum(limits, held)).sum(1) + held.shape[1]  # and the token that comes
    stores = [layer.store for layer in state.layers]
    budget = sum(int(number) * store.slot_nbytes for number, store in zip(allowed, stores, strict=True))
    if sum(store.nbytes for store in stores) <= budget:
        return ""
    empty = 0
    for store, rows in zip(stores, held, strict=True):
        packed = 0 if store.packed_rows is None else int(store.packed_rows.sum())
        dense = store.capacity * len(rows) - (int(rows.sum()) - packed)
        empty += max(0, dense) * store.slot_nbytes
    if not empty:
        return ""
    return (
        f"{size(empty)} of the keys and values are slots without a token: buffers grow in blocks ahead of the tokens "
        "that come, and are as long as their longest row"
    )


def _kept_beside(state: CacheState, held: np.ndarray) -> list[str]:
    """What a quantizer leaves in full precision, and what a merger remembers."""
    notes, quantizer, merger = [], state.config.quantizer, state.config.merger
    if quantizer is not None:
        packed = [layer.store.packed_rows for layer in state.layers]
        quantized = sum(0 if rows is None else int(rows.sum()) for rows in packed)
        full = (int(held.sum()) - quantized) * state.layers[0].store.slot_nbytes
        notes.append(
            f"quantizer {quantizer.name}: {size(full)} are in full precision, the last {quantizer.residual} tokens of "
            f"each layer and those that have not filled a group of {quantizer.group} yet"
        )
    remembered = sum(layer.merger_state.nbytes for layer in state.layers if layer.merger_state is not None)
    if merger is not None and remembered:
        notes.append(
            f"merger {merger.name}: remembers {size(remembered)} of what was merged, counted with the index; a token "
            "that others were merged into takes one slot, as their mean"
        )
    return notes
