"""A layer's store whose heads have different numbers of slots, in one flat buffer without gaps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.layout import owners, slots_after, sources, starts
from kvcompress.cache.store import DenseStore, fixed
from kvcompress.kernels import decode_attention, sent, write_slots
from kvcompress.policies.context import Keys, Queries, Values


class RaggedStore(DenseStore):
    """Keys and values of every row and head one after the other, so that bytes are what the heads hold together.

    `keys` and `values` are `[slots of all rows and heads, dim]`. While a forward of several tokens looks at them, they
    are copied into `[batch, kv_heads, slots, dim]` where heads differ, one layer at a time; decode steps on a GPU read
    them where they are.

    Attributes:
        slots: slots of each row and head, `[batch, kv_heads]`; on the host.
        start: the first of them, likewise; on the device.
        is_even: whether every row and head has as many slots.
    """

    def __init__(self) -> None:
        """Starts empty; the first append decides shapes, dtype and device."""
        super().__init__()
        self.slots: Counts = np.zeros((0, 0), dtype=np.int64)
        self.start: Int[Tensor, "batch kv_heads"] | None = None
        self.is_even, self._most = True, 0  # plain values, which a compiled step can read
        self._at: Int[Tensor, "batch kv_heads slots"] | None = None

    @property
    def capacity(self) -> int:
        """Slots of the row and head that has most."""
        return self._most

    @property
    def rows_and_heads(self) -> tuple[int, int]:
        """Rows, and key/value heads; 0 before the first token."""
        return self.slots.shape[0], self.slots.shape[1]

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one row's slot over all heads; 0 before the first token."""
        if self.keys is None or self.values is None:
            return 0
        return self.kv_heads * (self.keys.shape[1] + self.values.shape[1]) * self.keys.element_size()

    def buffers(self) -> list[Tensor]:
        """Every tensor that it holds, keys and values first."""
        return [*super().buffers(), *self.places()]

    def holders(self) -> tuple[object, ...]:
        """As of a dense store, and what says where slots are."""
        return (*super().holders(), self.start, self._at)

    def places(self) -> list[Tensor]:
        """Where each head's slots begin and, where no kernel reads them as they lie, where each of them is."""
        return [one for one in (self.start, self._at) if one is not None]

    def append(self, keys: Keys, values: Values, used: int) -> None:
        """Adds tokens after the first `used` slots of every row and head."""
        if self.keys is not None and self.values is not None and used:
            before = self.padded(used)
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self._hold_alike(keys.detach(), values.detach())

    def write(self, key: Keys, value: Values, slot: Int[Tensor, "batch sets"]) -> None:
        """Puts one token of each row into a slot of every head."""
        assert self.keys is not None and self.values is not None and self.start is not None
        write_slots(self.keys, self.values, key, value, slot, self.start)

    def dense(self) -> tuple[Keys, Values]:
        """Keys and values `[batch, kv_heads, slots, dim]`; copies where heads have different numbers of slots."""
        return self.padded(self.capacity)

    def padded(self, width: int) -> tuple[Keys, Values]:
        """The first slots of every row and head; where one has fewer, any others in their place."""
        assert self.keys is not None and self.values is not None and self.start is not None
        if self.is_even:
            keys, values = (buffer.view(*self.slots.shape, self.capacity, -1) for buffer in (self.keys, self.values))
            return keys[:, :, :width], values[:, :, :width]
        if self._at is not None:
            at = self._at[..., :width]
        else:
            at = (self.start.unsqueeze(-1) + torch.arange(width, device=self.start.device)).clamp_(
                max=len(self.keys) - 1
            )
        return self.keys[at], self.values[at]

    def _attend_in_place(self, query: Queries, scaling: float, length: Int[Tensor, "batch sets"]) -> Tensor:
        """Attention by a kernel that reads the slots in use where they are."""
        assert self.keys is not None and self.values is not None
        return decode_attention(query, self.keys, self.values, scaling, length, self.start, self.capacity)

    def take(
        self,
        rest: Int[Tensor, "batch sets slots"],
        capacity: Counts,
        first: Int[Tensor, "batch sets packed"] | None = None,
        packed_rows: Counts | None = None,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order, as many of each head as it is to have, and gives the others back."""
        self._lay_out(np.maximum(1, np.broadcast_to(capacity, self.slots.shape)), rest)

    def overwrite(self, keys: Keys, values: Values) -> None:
        """Replaces keys and values of the first slots."""
        assert self.keys is not None and self.values is not None
        written = np.minimum(self.slots, keys.shape[2])
        owner, place = owners(written)
        at = sent(slots_after(written * 0, written, self.slots), self.keys.device)
        entry = sent(owner * keys.shape[2] + place, self.keys.device)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.index_copy_(0, at, new.reshape(-1, new.shape[3]).index_select(0, entry))

    def replace(self, keys: Keys, values: Values) -> None:
        """Holds other keys and values of all rows and heads, as many of each."""
        self._hold_alike(keys, values)

    def _hold_alike(self, keys: Keys, values: Values) -> None:
        self._hold(*(new.contiguous().view(-1, new.shape[3]) for new in (keys, values)))
        self._count(np.full(keys.shape[:2], keys.shape[2]))

    def has_room(self, slots: Counts, most: int | None = None) -> bool:
        """Whether every row and head has so many slots, each its own."""
        return bool((slots <= self.slots).all())

    def grow(self, capacity: Counts) -> None:
        """Makes room for so many slots of each row and head."""
        if not self.has_room(capacity):
            self._lay_out(np.maximum(self.slots, capacity))

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows; in place where their number, and the slots of each, stay."""
        if self.keys is None or self.values is None:
            return
        before, now = copy.copy(self), self.slots[rows]
        alike = now.shape == self.slots.shape and bool((now == self.slots).all())
        self._lay_out(now, rows=rows)
        if alike:
            self.move_into(before)

    def move_into(self, before: DenseStore) -> None:
        """Puts what it holds into the buffers that it had before, where compiled steps look for it."""
        assert isinstance(before, RaggedStore) and before.keys is not None and before.values is not None
        at = sent(slots_after(before.slots * 0, self.slots, before.slots), before.keys.device)
        for buffer, now in ((before.keys, self.keys), (before.values, self.values)):
            assert now is not None
            buffer.index_copy_(0, at, now)
        self.keys, self.values, self.slots = before.keys, before.values, before.slots
        self.start, self._at, self.is_even, self._most = before.start, before._at, before.is_even, before._most

    def back_into(self, before: DenseStore) -> None:
        """Puts what it holds into the buffers that it had before, if every row and head fits."""
        assert isinstance(before, RaggedStore)
        if (self.slots <= before.slots).all():
            self.move_into(before)

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device, without waiting for the copy."""
        if self.keys is not None and self.values is not None:
            self._hold(*(buffer.to(device, non_blocking=True) for buffer in (self.keys, self.values)))
            self._count(self.slots)

    def saved(self, used: int) -> dict[str, Any]:
        """Everything, and how many slots each row and head has."""
        return {"keys": self.keys, "values": self.values, "slots": self.slots}

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        self._hold(saved["keys"].contiguous(), saved["values"].contiguous())
        self._count(saved["slots"])

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _lay_out(self, slots: Counts, order: Tensor | None = None, rows: Counts | None = None) -> None:
        """Copies slots into buffers in which each row and head has so many.

        Args:
            slots: slots of each row and head from now on.
            order: which of the slots of each, `[batch, sets, slots]`; the first ones if None. Where there are fewer,
                any slot stands in their place.
            rows: rows to take; all if None.
        """
        assert self.keys is not None and self.values is not None
        at = sources(self.slots, slots, self.keys.device, order, rows)
        self._hold(self.keys.index_select(0, at), self.values.index_select(0, at))
        self._count(slots)

    def _count(self, slots: Counts) -> None:
        """Takes note of how many slots each row and head has."""
        assert self.keys is not None
        self.slots, self._most = np.array(slots), int(slots.max(initial=0))
        self.is_even = bool((self.slots == self._most).all())
        self.start = fixed(sent(starts(self.slots), self.keys.device))
        on_cpu = self.keys.device.type == "cpu"
        self._at = None if self.is_even or not on_cpu else fixed(torch.as_tensor(self._every_place()))

    def _every_place(self) -> Counts:
        """Where each row's and head's slots are, `[batch, kv_heads, slots]`; the last again where it has fewer."""
        place = np.minimum(np.arange(self.capacity), self.slots[..., None] - 1)
        places: Counts = starts(self.slots)[..., None] + place
        return places
