"""Why a cache takes more bytes than its budget speaks of, in words."""

from __future__ import annotations

import numpy as np

from kvcompress.cache.allocation import protection, to_come
from kvcompress.cache.counts import Counts, stacked
from kvcompress.cache.state import CacheState
from kvcompress.config import CompressionConfig
from kvcompress.markup import size


def explained(state: CacheState, held: Counts) -> list[str]:
    """What stands beside the tokens that a budget counts, or takes more than it says; nothing where nothing does.

    Args:
        state: of the cache.
        held: tokens that each layer holds, `[layers, batch, sets]`.
    """
    if not held.size or not state.layers[0].store.slot_nbytes:
        return []
    packed = np.broadcast_to(stacked([layer.packed_rows for layer in state.layers]), held.shape)
    full = (held - packed).sum((1, 2))  # tokens in full precision, in slots of one set
    notes = (_protected(state, held), _no_room(state), _room(state, held, full), *_beside(state, held, full))
    return [note for note in notes if note]


def slots_of_row(state: CacheState, budget: int) -> float:
    """Slots over all layers of one row that so many bytes have room for; rows, layers and processes share them."""
    layers = len(state.layers)
    shares = layers * state.sequence.batch * state.heads.size
    known = [layer.store for layer in state.layers if layer.store.slot_nbytes]
    return sum(store.slots_within(budget / shares) for store in known) * layers / len(known)


def too_few_bytes(config: CompressionConfig, layers: int, slots: float) -> str:
    """Says that a budget in bytes leaves nothing of what was read, and is exceeded; empty where it is not so.

    Args:
        config: with the budget; where it protects tokens, those that are kept in spite of it are told instead.
        layers: that are compressed.
        slots: of one row, over all of them, that the bytes have room for.
    """
    more = to_come(config)
    if config.budget.bytes is None or slots >= layers * more or any(protection(config)):
        return ""
    least = round(config.budget.bytes * layers * more / slots)
    coming = "the token to come takes" if more == 1 else f"the {more} tokens to come take"
    return (
        f"the budget of {int(config.budget.bytes):,} bytes is below the {least:,} that {coming} in all layers and "
        "rows, so nothing that was read is kept; give more bytes, or fewer rows"
    )


def _protected(state: CacheState, held: Counts) -> str:
    """Sinks and recents that are more than the budget."""
    totals = state.rule.totals(state.sequence.row_seen)
    over = int(np.maximum(0, held.mean(2).sum(0) - totals).sum())
    if state.config.evictor is None or state.config.evictor.frees == "nothing" or state.recording or not over:
        return ""
    sinks, recents = protection(state.config)
    return (
        f"the first {sinks} and last {recents} tokens stay in every layer whatever the budget: over all layers "
        f"{over:,} tokens more than it says"
    )


def _no_room(state: CacheState) -> str:
    """A budget in bytes that has no room for what comes."""
    budget = state.config.budget.bytes
    if budget is None or state.recording:
        return ""
    return too_few_bytes(state.config, len(state.layers), slots_of_row(state, budget))


def _room(state: CacheState, held: Counts, full: Counts) -> str:
    """Slots without a token, where they take the cache over what its budget allows, or over a cache of every token."""
    limits, stores = state.limits(), [layer.store for layer in state.layers]
    allowed = (held if limits is None else np.maximum(limits, held)).sum((1, 2))
    allowed = allowed + held.shape[1] * held.shape[2]  # and the token that comes
    slot = np.array([store.slot_nbytes for store in stores]) / held.shape[2]
    every = held.shape[2] * int(state.sequence.row_seen.sum()) * slot.sum()  # what keeping every token would take
    if sum(store.nbytes for store in stores) <= min((allowed * slot).sum(), every):
        return ""
    dense = np.array([sum(buffer.nbytes for buffer in store.buffers()[:2]) for store in stores])
    empty = int((dense - full * slot).clip(min=0).sum())
    if not empty:
        return ""
    return (
        f"{size(empty)} of the keys and values are slots without a token: buffers grow in blocks ahead of the tokens "
        "that come, and are as long as their longest row"
    )


def _beside(state: CacheState, held: Counts, full: Counts) -> list[str]:
    """What a quantizer leaves in full precision, and what a merger remembers."""
    notes, quantizer, merger = [], state.config.quantizer, state.config.merger
    if quantizer is not None:
        exact = int(full.sum()) * state.layers[0].store.slot_nbytes // held.shape[2]
        notes.append(
            f"quantizer {quantizer.name}: {size(exact)} are in full precision, the last {quantizer.residual} tokens of "
            f"each layer and those that have not filled a group of {quantizer.group} yet"
        )
    remembered = sum(layer.merger_state.nbytes for layer in state.layers if layer.merger_state is not None)
    if merger is not None and remembered:
        notes.append(
            f"merger {merger.name}: remembers {size(remembered)} of what was merged, counted with the index; a token "
            "that others were merged into takes one slot, as their mean"
        )
    return notes
