"""A forward of one token for every row, and the room that buffers have for those to come."""

from __future__ import annotations

import copy

import numpy as np
import torch

from kvcompress.cache.merging import merge_freed
from kvcompress.cache.sequence import Counts, stacked
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Decode, Phase
from kvcompress.errors import PolicyError
from kvcompress.kernels import decode_bias, runs_triton
from kvcompress.parallel import ALONE
from kvcompress.policies.context import DecodeContext
from kvcompress.policies.faults import policy_errors

_COMPILED_BLOCK = 256  # steps that buffers get room for at once where steps are compiled
_BLOCK = 16  # slots by which a buffer grows at least, unless `reserve` says more


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
            _make_room(state)


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
        [layer.index[..., layer.store.packed :] for layer in layers],  # type: ignore[index]
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


def _make_room(state: CacheState) -> None:
    """Lets the buffers grow that this step needs larger, by a block."""
    table = state.table
    assert table is not None
    needed = table.extent
    for layer, slots in zip(state.layers, needed.max((1, 2)).tolist(), strict=True):
        layer.slots = slots
    if not _have_room(state, needed):
        grow_for(state, _block(state, int(needed.max())), needed)


def _have_room(state: CacheState, needed: Counts) -> bool:
    """Whether every buffer has so many slots, `[layers, batch, sets]`."""
    return all(layer.store.has_room(slots) for layer, slots in zip(state.layers, needed, strict=True))


def prepare_step(state: CacheState) -> None:
    """Does what the next step needs done on the host, as it may be a compiled one: quantizes a group, grows buffers."""
    table = state.table
    if table is None or state.recording or state.step is not None:
        return
    if not table.exact:
        table.steps += 1  # at most: this may be asked more than once before a step
    pack_if_due(state)
    needed = table.bound(1)
    if not _have_room(state, needed):
        catch_up_if_needed(state)
        grow_for(state, state.room or _block(state, int(needed.max())))


def grow_for(state: CacheState, steps: int, needed: np.ndarray | None = None) -> None:
    """Gives every buffer that is too small for what is needed, or for the next step, room for so many steps."""
    table = state.table
    assert table is not None
    needed, wanted = table.bound(1) if needed is None else needed, table.bound(steps)
    wanted = np.stack([layer.store.room(most) for layer, most in zip(state.layers, wanted, strict=True)])
    wanted = np.maximum(needed, wanted)
    with state.writable():
        if wanted.max() > table.capacity:
            table.grow(int(wanted.max()))
        later = table.held(steps)
        for layer, least, most in zip(state.layers, needed, wanted, strict=True):
            if state.room or not layer.store.has_room(least):
                layer.store.grow(most)
            layer.store.make_room(later[layer.number])


def pack_if_due(state: CacheState) -> None:
    """Quantizes what has become old enough, once some layer has a group of it; every tensor keeps its address.

    Where steps are compiled, the host knows when that may be so, and asks the device then: once in a group of steps.
    """
    if not _is_due(state):
        return
    catch_up_if_needed(state)
    if not _is_due(state):
        return
    table, quantizer = state.table, state.config.quantizer
    assert table is not None and quantizer is not None
    stores = [copy.copy(layer.store) for layer in state.layers]  # with the buffers that compiled steps know
    in_inference = stores[0].buffers()[0].is_inference()
    with state.changing(in_place=True), torch.inference_mode(in_inference), torch.no_grad():
        now, later = table.held(), table.held(_block(state, quantizer.residual + quantizer.group))
        tidy(state)
        for layer, before in zip(state.layers, stores, strict=True):
            layer.store.make_room(now[layer.number], later[layer.number])
            layer.pack()
            layer.store.move_into(before)
        table.become(make_table(state))
        state.table = table


def _is_due(state: CacheState) -> bool:
    """Whether some layer has a group to quantize, as far as the host knows, and this is a step to do it.

    Where heads have different numbers of tokens, nearly every step would bring some of them a group. So they wait for
    the next whole group of decode steps since the last forward of another kind, whatever other rows hold.
    """
    table, quantizer = state.table, state.config.quantizer
    if table is None or quantizer is None or state.recording:
        return False
    if table.held().max(initial=0) < quantizer.residual + quantizer.group:
        return False
    return not state.layers[0].by_head or table.decode_steps(state.sequence) % quantizer.group == 0


def _block(state: CacheState, slots: int) -> int:
    """Steps that buffers get room for where they grow: what is reserved, or a few where nothing is compiled."""
    if state.room:
        return state.room
    on_cpu = state.layers[0].device is None or state.layers[0].device.type == "cpu"
    return max(_BLOCK - 1, slots // 100) if on_cpu else _COMPILED_BLOCK


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
        table.free_now()
        _choose(state, table)
        table.learn_holes()
        if not table.hole.any():
            return
        for layer in state.layers:
            if state.config.merger is not None and state.config.merger.merges_decoding:
                merge_freed(layer, table, in_place=False)
            layer.tidy(table)
        table = make_table(state)
