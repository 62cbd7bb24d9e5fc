"""Reordering, repeating and dropping rows."""

from __future__ import annotations

from contextlib import suppress
from operator import index as as_index

import torch
from torch import Tensor

from kvcompress.cache import tables, undoing
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Phase
from kvcompress.errors import CacheStateError, shown


def whole(operation: str, number: object) -> int:
    """A whole number that an operation was called with, perhaps as a tensor.

    Raises:
        CacheStateError: if it is none.
    """
    if not isinstance(number, bool):
        with suppress(TypeError, RuntimeError, ValueError):
            return as_index(number)  # type: ignore[arg-type]
    raise CacheStateError(f"{operation}: takes a whole number; got {shown(number)}")


def select(state: CacheState, operation: str, numbers: object) -> None:
    """Lets every layer hold other rows, by the numbers of those that it holds; `operation` is what errors call it."""
    batch = before = state.sequence.batch
    state.check_ready()
    tables.catch_up_if_needed(state)
    if not batch:
        return
    index = numbers.detach() if isinstance(numbers, Tensor) else torch.empty(0)
    rows = index.cpu().numpy()
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows) or rows.min() < 0 or rows.max() >= batch:
        raise CacheStateError(
            f"{operation}: takes one or more of the rows 0 to {batch - 1} that the cache holds, as a vector of "
            f"integers; got {shown(numbers.tolist() if isinstance(numbers, Tensor) else numbers)}"
        )
    index = index.long()
    with state.changing(in_place=True) as step:
        if state.allocation is not None:
            state.allocation.select_rows(index, rows)
        state.sequence.select_rows(index, rows)
        for layer in state.layers:
            layer.select_rows(index, rows)
        if state.table is not None:
            state.table.select_rows(index, rows, state.own_allocation)
        state.own.select_rows(index)
        state.calls.select_rows(index)
        if len(rows) != before and state.config.budget.bytes is not None and state.allocation is not None:
            # Bytes are shared by all rows, so each one's share has changed.
            may_be_undone, state.waiting = state.recording and state.waiting is not None, Phase.PREFILL
            if not may_be_undone:
                tables.tidy(state)
                state.own.crop(0)
                undoing.let_go(state, step)
