"""A forward of several tokens: how it begins, and how the layers get their budgets."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache import tables
from kvcompress.cache.allocation import Allocation, Rule, allocate
from kvcompress.cache.counts import Counts, stacked
from kvcompress.cache.masks import Mask
from kvcompress.cache.ranking import Ranked, Ranking, ranking_of
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.room import grow_for
from kvcompress.cache.selection import compress, compress_waiting, pin
from kvcompress.cache.sizes import slots_of_row, too_few_bytes
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Phase, Prefill
from kvcompress.config import CompressionConfig
from kvcompress.errors import BudgetWarning, ConfigError, shown
from kvcompress.policies.context import AllocationContext, TowerView
from kvcompress.policies.images import ImageLayout


def begin(
    state: CacheState,
    queries: int,
    device: torch.device,
    mask: Mask,
    layout: ImageLayout | None,
    tower: TowerView | None = None,
) -> None:
    """Makes the step of a forward of so many positions, and notes their tokens and what is known of images."""
    batch = len(mask.row_new)
    tables.catch_up_if_needed(state)
    sequence, first = state.sequence, state.sequence.seen
    step = Prefill(queries=queries, evicts=not state.recording, row_new=mask.row_new, part=state.part)
    state.step, state.reduced = step, None  # from here on, what is interrupted has failed
    tables.tidy(state)
    new_valid, step.order, step.first_order = mask.new_valid, mask.order, mask.order
    step.last_seen = mask.last_in_order()
    if mask.hidden is not None:
        _hide(state, mask.hidden)
    sequence.extend(new_valid, queries, step.row_new)
    if mask.last_seen is not None:
        sequence.mark_seen_early(mask.last_seen, mask.new_valid)
    step.row_seen = sequence.row_seen
    index = sequence.index_of_positions(device)[:, first:]
    if step.order is not None:
        index = index.gather(1, step.order)
        new_valid = index >= 0
    step.index, step.valid = index.expand(batch, -1).to(torch.int32).unsqueeze(1), new_valid
    if layout is not None and state.config.reducer is not None:
        points = state.config.reducer.acts_after(len(state.layers))
        if points:
            step.reduction = _reduction(state, step, layout, points, tower)
    if not (state.config.evictor is None or state.recording or step.reduction is not None):
        if not state.config.allocator.reads_importance:
            before = stacked(
                [layer.held if len(layer.held) else np.zeros((batch, 1), dtype=np.int64) for layer in state.layers]
            )
            step.local = partial(_allocate_once, state, before + step.row_new[:, None], device)


def end(state: CacheState, step: Prefill) -> None:
    """Compresses all layers where their sizes depend on each other, and makes the table for decoding."""
    if state.recording:
        state.waiting = Phase.PREFILL
    elif state.config.evictor is None:
        for layer in state.layers:
            layer.close_ranks(room=_reserved(state))
            layer.pack()
    elif step.local is None:
        compress_all(state, step)
    else:
        compress_waiting(step)
        pin(state.layers)
    step.problems.refuse()
    tables.make_table(state)
    if state.room:
        grow_for(state, state.room)


def compress_all(state: CacheState, step: Prefill) -> None:
    """Allocates over all layers, then lets each keep what it may."""
    ranking = ranking_of(state.layers, state.config, step)
    importance, context = _allocation_inputs(state, state.config, ranking)
    held = stacked([layer.held for layer in state.layers])
    state.allocation = _allocate(state, held, importance.device, importance, replace(context, problems=step.problems))
    step.room = _room_for(state, state.allocation)
    compress(state.layers, step, state.allocation, ranking)
    pin(state.layers)


def allocation_at(state: CacheState, config: CompressionConfig, ranked: list[Ranked]) -> Allocation:
    """What another configuration's allocator and budget would give the layers, from the scores that are there."""
    importance, context = _allocation_inputs(state, config, ranking_of(state.layers, config, Prefill(), ranked))
    rule = _budget_rule(state, config)
    held = held_by_allocator(state, config, stacked([layer.held for layer in state.layers]))
    return allocate(config, rule, state.sequence.row_seen, held, importance.device, importance, context)


def check_allocation_at(state: CacheState, config: object) -> None:
    """Refuses what `allocation_at` cannot answer, since the cache took nothing of what the allocator reads.

    Raises:
        ConfigError: naming the allocator and the way out.
    """
    if not isinstance(config, CompressionConfig):
        raise ConfigError(
            "config: must be a CompressionConfig, such as CompressionConfig.preset('prefixkv') or cache.config with "
            f"another budget; got {shown(config)}"
        )
    allocator, own = config.allocator, state.config
    missing = [name for name in allocator.needs if any(name not in layer.statistics for layer in state.layers)]
    if missing:
        raise ConfigError(
            f"allocator {allocator.name}: reads the statistics {', '.join(missing)} of a prompt's attention, which "
            f"this cache did not take for its own allocator {own.allocator.name}; make the cache with the allocator "
            f"{allocator.name} too, or ask for one that reads no statistics, such as 'prefix'"
        )
    if allocator.reads_importance and own.scorer is None:
        raise ConfigError(
            f"allocator {allocator.name}: reads importance, and the cache has no scorer that would give it; make the "
            "cache with a scorer, or ask for an allocator that reads none, such as 'uniform'"
        )


def _allocation_inputs(
    state: CacheState, config: CompressionConfig, ranking: Ranking
) -> tuple[Tensor, AllocationContext]:
    """What an allocator reads: the importance of every layer's slots, and what belongs to it."""
    if config.allocator.by_head:
        importance, context = ranking.of_heads(state.layers[0].kv_heads * state.heads.size)
    else:
        importance, context = ranking.means()
    statistics = {
        name: torch.stack([layer.statistics[name].to(importance.device) for layer in state.layers])
        for name in config.allocator.needs
    }
    return importance, replace(context, statistics=statistics)


def _allocate_once(state: CacheState, held: np.ndarray, device: torch.device) -> Allocation:
    """The budgets of a step whose allocator reads no scores; found when the first layers are cut."""
    step = state.step
    assert isinstance(step, Prefill)
    if not step.room:
        state.allocation = _allocate(state, held, device)
        step.room = _room_for(state, state.allocation)
    assert state.allocation is not None
    return state.allocation


def _allocate(
    state: CacheState,
    held: np.ndarray,
    device: torch.device,
    importance: Tensor | None = None,
    context: AllocationContext | None = None,
) -> Allocation:
    state.rule = _budget_rule(state, state.config)
    held = held_by_allocator(state, state.config, held)
    return allocate(state.config, state.rule, state.sequence.row_seen, held, device, importance, context)


def held_by_allocator(state: CacheState, config: CompressionConfig, held: Counts) -> Counts:
    """What this process's layers hold as an allocator counts it: in layers, or in the heads of all processes."""
    if not config.allocator.by_head:
        least: Counts = held.min(2, keepdims=True)
        return least
    of_heads = np.broadcast_to(held, (*held.shape[:2], state.layers[0].kv_heads))
    gathered = state.heads.gather(torch.as_tensor(np.array(of_heads)).flatten(0, 1))
    everywhere: Counts = gathered.numpy().reshape(*held.shape[:2], -1)
    return everywhere


def _room_for(state: CacheState, allocation: Allocation) -> list[Counts]:
    """Slots to allocate beyond each layer's budget: for the token that comes, and what is reserved."""
    evictor, row_seen, reserve = state.config.evictor, state.sequence.row_seen, _reserved(state)
    period = 0 if evictor is None else evictor.cuts_every or 0
    if evictor is None or (evictor.frees == "nothing" and not period):
        return [np.full((1, 1), reserve)] * len(state.layers)
    own = allocation.own(state.heads)
    later = own.limits(state.rule, row_seen + reserve)
    if period:
        return list(np.clip(later + period - own.budgets, 0, reserve))
    return list(np.clip(later - own.budgets, 0, reserve) + 1)


def _reserved(state: CacheState) -> int:
    """Slots to reserve where tokens are selected; a quantizer has yet to say how many of them stay as they are."""
    return state.room if state.config.quantizer is None else 0


def _budget_rule(state: CacheState, config: CompressionConfig) -> Rule:
    """What the budget says of a row; bytes are shared by all rows, layers and processes."""
    budget, layers = config.budget, len(state.layers)
    if budget.bytes is None:
        return Rule.of(config, layers)
    slots = slots_of_row(state, budget.bytes)
    if told := too_few_bytes(config, layers, slots):
        warnings.warn(told, BudgetWarning, stacklevel=2)
    return Rule.of(config, layers, slots)


def _reduction(
    state: CacheState, step: Prefill, layout: ImageLayout, points: tuple[int, ...], tower: TowerView | None
) -> Reduction:
    """A reducer at work in a step whose images are known."""
    assert state.config.reducer is not None and step.index is not None
    index, images = step.index[:, 0], state.sequence.images_at(step.index)
    assert images is not None
    order = step.order
    return Reduction(
        state.config.reducer,
        points,
        layout if order is None else layout.aligned(order),
        index=index,
        valid=step.valid,
        is_image=images[:, 0],
        order=order,
        last_seen=step.last_seen,
        tower=tower if order is None or tower is None else tower.aligned(order),
    )


def _hide(state: CacheState, hidden: Tensor) -> None:
    """Gives up tokens that an attention mask hides from now on, as if they had been padding."""
    new_index = state.sequence.hide(hidden)
    with state.writable():
        for layer in state.layers:
            layer.renumber(new_index)


def reduces_first(state: CacheState) -> bool:
    """Whether the reducer acts before the first layer, so that the step begins before it."""
    reducer = state.config.reducer
    return reducer is not None and 0 in reducer.acts_after(len(state.layers))


def reduce(state: CacheState, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
    """What goes into a decoder layer where a reducer acts; None for what was about to."""
    step = state.step
    if not isinstance(step, Prefill) or step.reduction is None or step.next_layer != layer:
        return None
    reduction = step.reduction
    if layer < reduction.points[0]:
        return None
    hidden = reduction.taken_again(hidden)
    if layer in reduction.points:
        with state.writable():
            hidden = reduction.reduce(layer, hidden)
            state.sequence.reduce(layer, _in_all_positions(reduction.into[layer], step, state.sequence.seen))
            step.index, step.valid = reduction.index.to(torch.int32).unsqueeze(1), reduction.valid
            step.row_new, step.order, step.last_seen = np.asarray(reduction.row_tokens), None, reduction.last_seen
    return hidden, reduction


def _in_all_positions(into: Tensor, step: Prefill, seen: int) -> Tensor:
    """What became of a step's positions, in the numbers of all positions seen; older ones are their own."""
    first = seen - into.shape[1]
    if not first and step.first_order is None:
        return into
    every = torch.arange(seen, device=into.device).repeat(len(into), 1)
    if step.first_order is not None:  # from positions with padding first to the model's
        into = torch.where(into < 0, -1, step.first_order.gather(1, into.clamp(min=0)))
        into = torch.empty_like(into).scatter_(1, step.first_order, into)
    every[:, first:] = torch.where(into < 0, -1, into + first)
    return every
