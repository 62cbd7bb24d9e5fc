"""Reordering, repeating and dropping rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.cache import tables, undoing
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Phase
from kvcompress.errors import CacheStateError


def select(state: CacheState, operation: str, index: Tensor) -> None:
    """Lets every layer hold other rows, by the numbers of those that it holds; `operation` is what errors call it."""
    batch = before = state.sequence.batch
    state.check_ready()
    tables.catch_up_if_needed(state)
    if not batch:
        return
    numbers = index.ndim == 1 and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    rows = index.cpu().numpy()
    if not numbers or not len(rows) or rows.min() < 0 or rows.max() >= batch:
        raise CacheStateError(
            f"{operation}: takes one or more of the rows 0 to {batch - 1} that the cache holds, as a vector of "
            f"integers; got {index.tolist()}"
        )
    index = index.long()
    with state.changing(in_place=True):
        if state.allocation is not None:
            state.allocation.select_rows(index, rows)
        state.sequence.select_rows(index, rows)
        for layer in state.layers:
            layer.select_rows(index, rows)
        if state.table is not None:
            state.table.select_rows(index, rows, state.own_allocation)
        state.own.select_rows(index)
        state.calls.select_rows(index)
    if (
        len(rows) != before and state.config.budget.bytes is not None and state.allocation is not None
    ):  # bytes are shared by all rows, so each one's share has changed
        may_be_undone, state.waiting = state.recording and state.waiting is not None, Phase.PREFILL
        if not may_be_undone:
            undoing.compress(state)
