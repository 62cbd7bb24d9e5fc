"""The room that buffers have for tokens to come, and what is quantized while it is made."""

from __future__ import annotations

import copy

import numpy as np
import torch

from kvcompress.cache.counts import Counts
from kvcompress.cache.state import CacheState
from kvcompress.cache.tables import catch_up_if_needed, make_table, tidy

_COMPILED_BLOCK = 256  # steps that buffers get room for at once where steps are compiled
_BLOCK = 16  # slots by which a buffer grows at least, unless `reserve` says more


def make_room(state: CacheState) -> None:
    """Lets the buffers grow that this step needs larger, by a block."""
    table = state.table
    assert table is not None
    needed, widest = table.extent, _widest(table.extent)
    for layer, slots in zip(state.layers, widest, strict=True):
        layer.slots = slots
    if not _have_room(state, needed, widest):
        grow_for(state, _block(state, max(widest)), needed)


def _widest(needed: Counts) -> list[int]:
    """Slots of each layer in the row and set that needs most."""
    widest: list[int] = needed.max((1, 2)).tolist()
    return widest


def _have_room(state: CacheState, needed: Counts, widest: list[int]) -> bool:
    """Whether every buffer has so many slots, `[layers, batch, sets]`."""
    every = zip(state.layers, needed, widest, strict=True)
    return all(layer.store.has_room(slots, most) for layer, slots, most in every)


def prepare_step(state: CacheState) -> None:
    """Does what the next step needs done on the host, as it may be a compiled one: quantizes a group, grows buffers."""
    table = state.table
    if table is None or state.recording or state.step is not None:
        return
    if not table.exact:
        table.steps += 1  # at most: this may be asked more than once before a step
    pack_if_due(state)
    needed = table.bound(1)
    if not _have_room(state, needed, _widest(needed)):
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
