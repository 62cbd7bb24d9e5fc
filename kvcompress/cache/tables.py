"""When a slot table begins and ends: what it is made from, and what layers learn from it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvcompress.cache.counts import stacked
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.state import CacheState
from kvcompress.kernels import runs_triton


def make_table(state: CacheState) -> SlotTable:
    """The table for the decode steps to come, from what the layers hold now."""
    layers, sequence, evictor = state.layers, state.sequence, state.config.evictor
    packed = stacked([layer.packed_rows for layer in layers])
    held = stacked([layer.held for layer in layers])
    pinned = stacked([layer.pinned if len(layer.pinned) else layer.held * 0 for layer in layers])
    frees = "nothing" if evictor is None else evictor.frees
    allocation = None if frees == "nothing" else state.own_allocation
    sized = state.own_allocation if state.cut is not None else allocation
    if sized is not None and sized.sets > 1:
        held, pinned = (np.array(np.broadcast_to(counts, sized.budgets.shape)) for counts in (held, pinned))
    chooses = frees == "chosen" and layers[0].unscored is None
    ranks = [ranks for layer in layers if (ranks := layer.ranks()) is not None] if chooses else []
    state.table = SlotTable(
        [_unpacked(layer) for layer in layers],
        held - packed,
        np.maximum(0, np.maximum(pinned, packed) - packed),
        [layer.store.capacity for layer in layers],
        sequence.row_seen,
        sequence.seen,
        allocation,
        state.rule,
        by_age=frees == "oldest",
        scored_end=sequence.scored.end,
        packed=packed if packed.any() or state.config.quantizer is not None else None,
        ranks=ranks or None,
        sets=layers[0].kv_heads if evictor is not None and evictor.by_head else 1,
        cut=state.cut,
    )
    for layer in layers:
        layer.heads_part = layer.heads_part or state.table.sets > 1
    state.has_kernels = runs_triton(state.table.index.device)
    return state.table


def _unpacked(layer: CompressedLayer) -> Tensor:
    """Token index of a layer's slots in full precision."""
    assert layer.index is not None
    return layer.index[..., layer.store.packed :] if layer.store.packed else layer.index


def tidy(state: CacheState) -> None:
    """Brings the tokens of every layer in order again after decode steps."""
    table, state.table = state.table, None
    if table is None:
        return
    if not table.exact:
        _catch_up(state, table)
    if table.steps:
        with state.writable():
            for layer in state.layers:
                layer.tidy(table)


def _catch_up(state: CacheState, table: SlotTable) -> None:
    """Learns from the device how far it has come; waits for it."""
    more = table.settle() - state.sequence.seen
    for layer, slots in zip(state.layers, table.extent.max((1, 2)).tolist(), strict=True):
        layer.slots = slots
    if more:
        state.sequence.extend(None, more, np.full(state.sequence.batch, more), scored=False)


def catch_up_if_needed(state: CacheState) -> None:
    """Lets the host know of compiled steps that it did not count."""
    if state.table is not None and not state.table.exact:
        _catch_up(state, state.table)
