"""A forward of one token for every row: how it begins, and which slots it frees."""

from __future__ import annotations

import numpy as np
import torch

from kvcompress.cache.counts import stacked
from kvcompress.cache.merging import merge_freed
from kvcompress.cache.room import make_room, pack_if_due
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Decode, Phase
from kvcompress.cache.tables import make_table
from kvcompress.errors import PolicyError
from kvcompress.kernels import decode_bias
from kvcompress.parallel import ALONE
from kvcompress.policies.context import DecodeContext
from kvcompress.policies.faults import policy_errors


def begin(state: CacheState) -> None:
    """Makes the step of a forward of one token for every row, and advances the table."""
    if torch.compiler.is_compiling():
        state.step = Decode(evicts=not state.recording)
        assert state.table is not None
        state.table.exact = False
    elif not state.device_only:
        count(state)
    step, table, alike = state.step, state.table, False
    assert isinstance(step, Decode) and table is not None
    step.device_only = host_is_left_out(state)
    if not step.device_only and table.exact:
        step.widths = table.extent.max((1, 2)).tolist()
        alike = bool((table.extent == table.extent[:, :1, :1]).all())
    with state.writable():
        table.advance(step.evicts)
    recent = state.layers[0].recent
    if recent is not None:
        step.place = table.newest(recent.query.shape[2])
    if state.has_kernels:
        step.length = table.length
    elif not alike:
        step.bias = decode_bias(table.length, table.capacity, state.dtype)


def count(state: CacheState) -> None:
    """What the host does for a decode step before the device: it quantizes, counts tokens, and lets buffers grow."""
    pack_if_due(state)
    sequence, table = state.sequence, state.table or make_table(state)
    step = state.step = Decode(evicts=not state.recording)  # from here on, what is interrupted has failed
    sequence.extend(None, 1, np.ones(sequence.batch, dtype=np.int64), scored=False)
    table.count(sequence.row_seen, step.evicts)
    if table.exact:
        with state.writable():
            make_room(state)


def end(state: CacheState) -> None:
    """Frees a slot of every layer over its limit, unless that has to wait."""
    step, table, merger = state.step, state.table, state.config.merger
    assert isinstance(step, Decode) and table is not None
    if step.evicts:
        _choose(state, table)
        if merger is not None and merger.merges_decoding:
            for layer in state.layers:
                merge_freed(layer, table, in_place=True)
    state.ran = "compiled" if torch.compiler.is_compiling() else "eager"
    if not host_is_left_out(state):
        finish(state)
    elif torch.compiler.is_compiling():
        state.step = None


def finish(state: CacheState) -> None:
    """What the host does after a decode step: it forgets the step, or that it may have to be undone is noted."""
    if state.recording:
        state.waiting = Phase.DECODE
    state.step = None


def compiles(state: CacheState) -> bool:
    """Whether steps can be compiled: not while the past is recorded, freed slots are merged or the host counts."""
    merger, reducer = state.config.merger, state.config.reducer
    merges = merger is not None and merger.merges_decoding
    renumbers = reducer is not None and reducer.positions == "per_layer"
    host = merges or renumbers or state.heads is not ALONE or bool(state.own) or state.typed
    return not (state.recording or host)


def host_is_left_out(state: CacheState) -> bool:
    """Whether only what is asked of the device counts: in steps that are traced or captured."""
    return torch.compiler.is_compiling() or state.device_only


def _choose(state: CacheState, table: SlotTable) -> None:
    """Frees the slots that an evictor chooses, if it does."""
    evictor, heads = state.config.evictor, state.heads
    if evictor is None or evictor.frees != "chosen" or state.allocation is None:
        return
    index, protected, importance = table.index, table.protected(), table.importance()
    if state.allocation.sets > 1:  # a head that holds as many as it likes is a row of its own
        with policy_errors(evictor):
            seen = (index, protected, importance)
            own = [None if one is None else one.flatten(0, 2).unsqueeze(1) for one in seen]
            victims = evictor.victim(DecodeContext(*own))  # type: ignore[arg-type]
        table.choose(victims.view(table.length.shape))
        return
    index, protected = index.flatten(0, 1), protected.flatten(0, 1)
    uneven = any(layer.uneven for layer in state.layers)
    gather = heads.gather_slots if uneven else lambda tensor, fill: heads.gather(tensor)
    if table.sets > 1 or evictor.by_head:
        index, protected = gather(index, fill=-1), gather(protected, fill=1)
    importance = None if importance is None else gather(importance.flatten(0, 1), fill=torch.nan)
    with policy_errors(evictor):
        victims = evictor.victim(DecodeContext(index, protected, importance))
        sets = victims.shape[1]
    if sets > index.shape[1]:
        raise PolicyError(
            f"evictor {evictor.name}: named a slot for each head, but its by_head says that heads hold the same "
            "tokens; let by_head be True"
        )
    table.choose(heads.own(victims).view(*table.length.shape[:2], -1))


def evict_waiting(state: CacheState) -> None:
    """Lets the decode rule free as many slots as decode steps did not while the past was recorded."""
    evictor = state.config.evictor
    if evictor is None or evictor.frees == "nothing" or state.allocation is None:
        return
    table = make_table(state)
    limits = state.limits()
    while True:
        held = stacked([layer.held for layer in state.layers])
        if (held <= limits).all():
            return
        table.free_oldest()
        _choose(state, table)
        table.learn_holes()
        if not table.hole.any():
            return
        for layer in state.layers:
            if state.config.merger is not None and state.config.merger.merges_decoding:
                merge_freed(layer, table, in_place=False)
            layer.tidy(table)
        table = make_table(state)
