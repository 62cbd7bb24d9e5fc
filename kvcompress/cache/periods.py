"""Scoring and cutting every layer anew between decode steps, for evictors that do so in periods."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from kvcompress.cache import prefill, tables
from kvcompress.cache.counts import Counts, stacked
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.scoring import Unscored, context_of, learn, scores_by
from kvcompress.cache.selection import compress
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Prefill
from kvcompress.cache.store import rows_at
from kvcompress.kernels import attend_blocks, with_sinks


def is_due(state: CacheState) -> bool:
    """Whether a period of decode steps is over, as the host knows it: at the latest when it is."""
    evictor, sequence, table = state.config.evictor, state.sequence, state.table
    if evictor is None or evictor.cuts_every is None or state.allocation is None or not sequence.batch:
        return False
    since = int((sequence.row_seen - sequence.scored.end).max())
    if table is not None and not table.exact:
        since += table.positions_at_most - sequence.seen
    return since >= evictor.cuts_every


def cut_if_due(state: CacheState, asks: bool = False) -> None:
    """Scores and cuts every layer once a period is over; what decode steps read keeps its address if it can.

    After the step that fills it; where steps are compiled, before the next one or at the end of `generate`.

    Args:
        state: what the cache knows.
        asks: whether to ask the device how far it has come, whatever the host knows.
    """
    if state.table is None or state.recording or state.step is not None or state.cut is None:
        return
    if not (asks or is_due(state)):
        return
    tables.catch_up_if_needed(state)
    if not is_due(state):
        return
    in_inference = state.layers[0].store.buffers()[0].is_inference()
    with state.changing(in_place=True), torch.inference_mode(in_inference), torch.no_grad():
        table = state.table
        cut(state, in_place=True)
        table.become(tables.make_table(state))
        state.table = table


def cut(state: CacheState, in_place: bool) -> None:
    """Scores every layer by the last queries and lets it keep its share of the budget, a layer at a time.

    Args:
        state: what the cache knows, a change of it in progress.
        in_place: whether keys and values stay where decode steps look for them, as far as they fit.
    """
    table, state.table, step, sequence = state.table, None, state.step, state.sequence
    assert state.allocation is not None and isinstance(step, Prefill)
    held = prefill.held_by_allocator(state, state.config, _held(state, table))
    limits = state.allocation.limits(state.rule, sequence.row_seen)
    allocation = replace(state.allocation, budgets=np.minimum(limits, held))
    sequence.score_again(_window(state))
    step.row_seen, step.room = sequence.row_seen, [np.zeros((1, 1), dtype=np.int64)] * len(state.layers)
    for layer in state.layers:
        before = copy.copy(layer.store)
        if table is not None and table.steps:
            layer.tidy(table)
        _score(layer, step)
        compress([layer], step, allocation)
        if in_place:
            layer.store.back_into(before)
    step.problems.refuse()


def _score(layer: CompressedLayer, step: Prefill) -> None:
    """Scores every slot of a layer by its last queries, as a forward of their tokens would."""
    recent, scorer = layer.recent, layer.config.scorer
    assert recent is not None and scorer is not None and layer.index is not None
    (keys, values), index, query = layer.every_slot(), layer.index, recent.in_order(layer.sequence.seen)
    order = valid = lse = None
    if (layer.held != index.shape[2]).any():  # empty slots first, so that every row and head ends with its last token
        order = index.expand(len(keys), -1, -1).argsort(dim=-1, stable=True)
        keys, values, index = rows_at(keys, order), rows_at(values, order), index.gather(-1, order)
        valid = index[:, : layer.held.shape[1]] >= 0
    if scorer.reads_attention:
        past, blocks = index.shape[2] - query.shape[2], [(keys.to(query.dtype), values.to(query.dtype))]
        output, lse = attend_blocks(query, blocks, past, recent.scaling, valid, True, recent.softcap)
        assert lse is not None
        _, lse = with_sinks(output, lse, recent.sinks)
    of = Unscored(query, lse, recent.scaling, recent.softcap, layer.weights, layer.heads_part)
    scores = scores_by(scorer, step, context_of(layer, step, of, keys, values, index, valid))
    if order is not None:
        scores = torch.empty_like(scores).scatter_(-1, order.expand_as(scores), scores)
    learn(layer, scorer, scores)


def _window(state: CacheState) -> int:
    """Queries that score."""
    recent = state.layers[0].recent
    assert recent is not None
    return recent.query.shape[2]


def _held(state: CacheState, table: SlotTable | None) -> Counts:
    """Tokens that each layer holds, `[layers, batch, sets]`."""
    if table is None or not table.steps:
        return stacked([layer.held for layer in state.layers])
    held: Counts = table.extent - table.hole + stacked([layer.packed_rows for layer in state.layers])
    return held
