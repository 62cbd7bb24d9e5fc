"""Where slots lie whose rows and heads have different numbers of them, one after the other without gaps."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.kernels import sent


def starts(slots: Counts) -> Counts:
    """Slots before those of each row and head, `[batch, kv_heads]`."""
    flat = slots.reshape(-1)
    before: Counts = (flat.cumsum() - flat).reshape(slots.shape)
    return before


def owners(slots: Counts) -> tuple[Counts, Counts]:
    """For each slot of a layout the number of its row and head, and its place among theirs."""
    flat = slots.reshape(-1)
    owner = np.repeat(np.arange(flat.size), flat)
    return owner, np.arange(owner.size) - starts(flat)[owner]


def slots_after(before: Counts, count: Counts, slots: Counts) -> Counts:
    """Where in a layout the next `count` slots of each row and head are, after the first `before`."""
    owner, place = owners(np.broadcast_to(count, slots.shape))
    found: Counts = (starts(slots) + before).reshape(-1)[owner] + place
    return found


def sources(
    before: Counts,
    slots: Counts,
    device: torch.device,
    order: Int[Tensor, "batch sets slots"] | None = None,
    rows: Counts | None = None,
) -> Int[Tensor, " all_slots"]:
    """Which slot of one layout goes into each slot of another.

    Args:
        before: slots of each row and head, `[batch, kv_heads]`, as they lie; some at least.
        slots: slots of each row and head, as they are to lie.
        device: where the answer is to be.
        order: which of the slots of each go into its new ones; the first if None. Beyond them, any slot does.
        rows: rows that go into the new ones; all, in their order, if None.
    """
    begin = starts(before) if rows is None else starts(before)[rows]
    owner, place = owners(slots)
    if order is None or not order.shape[2]:
        at = sent(begin.reshape(-1)[owner] + place, device)
    else:
        width = order.shape[2]
        entry = sent(owner * width + np.minimum(place, width - 1), device)
        at = order.expand(-1, slots.shape[1], -1).reshape(-1).index_select(0, entry)
        at = at + sent(begin.reshape(-1)[owner], device)
    return at.clamp_(max=int(before.sum()) - 1)
