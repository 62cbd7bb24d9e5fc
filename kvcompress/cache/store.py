"""The buffers of one layer: keys, values, the column of every slot, and its score."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.cache.lanes import Lane
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.context import Columns, Importance, Keys, Values


class DenseStore:
    """Keys and values of one layer in full precision, with room to grow.

    After an append or a selection, a row's tokens lie in the first positions, in the order of their columns. A decode
    step may empty a position (column -1), which the next token takes. Rows may hold different counts; `length` covers
    the longest.
    """

    def __init__(self, heads: HeadGroup = ALONE) -> None:
        """Starts empty; the first append decides shapes, dtype and device.

        Args:
            heads: which of the layer's heads these are, where several processes share them.
        """
        self.heads = heads
        self.heads_part = False  # whether the heads of the layer, in any process, hold different tokens
        self.keys: Keys | None = None
        self.values: Values | None = None
        self.scores: Float[Tensor, "batch kv_heads slots"] | None = None
        self.merger_state: Tensor | None = None  # what the merger remembers of this layer, batch first
        self.batch = 0
        self.length = 0
        self.packed = 0  # first positions that are quantized and lie elsewhere
        self.device: torch.device | None = None
        self._columns: Columns | None = None
        self._lanes: list[Lane] = []  # one for all rows while their tokens lie alike, else one a row
        self._ordered = True
        self._late: dict[int, int] = {}  # position -> column, not yet on the device; only while there is one lane

    def writable(self) -> AbstractContextManager[Any]:
        """Lets buffers that were made in inference mode be written to, also by a caller who has left it."""
        if torch.is_inference_mode_enabled():
            return nullcontext()
        made_in_it = any(
            buffer is not None and buffer.is_inference() for buffer in (self.keys, self._columns, self.scores)
        )
        return torch.inference_mode() if made_in_it else nullcontext()

    def snapshot(self) -> DenseStore:
        """The same store, untouched by what happens to this one; tensors are shared."""
        other = copy.copy(self)
        other._lanes, other._late = copy.deepcopy(self._lanes), dict(self._late)
        return other

    def unshare(self) -> None:
        """Copies every tensor, so that writing to it leaves a snapshot as it is."""
        self._each_tensor(Tensor.clone)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> list[int]:
        """Tokens that each row holds."""
        if len(self._lanes) == 1:
            return [self._lanes[0].count] * self.batch
        return [lane.count for lane in self._lanes]

    @property
    def capacity(self) -> int:
        """Slots that are allocated."""
        return 0 if self.keys is None else self.packed + self.keys.shape[2]

    @property
    def rows_alike(self) -> bool:
        """Whether the tokens of all rows lie in the same positions."""
        return len(self._lanes) == 1

    @property
    def has_holes(self) -> bool:
        """Whether some position in use is empty, so that attention needs a mask."""
        return any(lane.count != self.length for lane in self._lanes)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def index_nbytes(self) -> int:
        """Bytes allocated for columns, scores and what the merger remembers."""
        index = (self._columns, self.scores, self.merger_state)
        return sum(tensor.nbytes for tensor in index if tensor is not None)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one row's slot in full precision over all heads."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row whose keys and values fit into so many bytes."""
        return nbytes / self.slot_nbytes

    def slots(self) -> tuple[Keys, Values]:
        """Keys and values of the positions in use, as views."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def blocks(self, rows: slice, end: int) -> Iterator[tuple[Keys, Values]]:
        """Keys and values of the first `end` positions of some rows, in as many pieces as suit the storage."""
        keys, values = self.slots()
        yield keys[rows, :, :end], values[rows, :, :end]

    def columns(self) -> Columns:
        """Columns of the positions in use, -1 where one is empty, as a view."""
        assert self._columns is not None
        if self._late:
            with self.writable():
                late = torch.tensor(list(self._late.items()), dtype=torch.int32, device=self._columns.device)
                positions = late[:, 0].long()
                self._columns[:, :, positions] = late[:, 1]
                if self.scores is not None:
                    self.scores[:, :, positions] = torch.nan
            self._late = {}
        return self._columns[:, :, : self.length]

    def used_scores(self) -> Float[Tensor, "batch kv_heads slots"] | None:
        """Scores of the positions in use, NaN where a token has none yet; None before any were set."""
        self.columns()
        return None if self.scores is None else self.scores[:, :, : self.length]

    def holds_from(self, column: int) -> list[int]:
        """Tokens per row, in the set that has fewest, that stand at `column` or later."""
        if self.keys is None:
            return []
        held = (self.columns() >= column).sum(-1)
        return (self.heads.gather(held) if self.heads_part else held).amin(1).tolist()

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(
        self, keys: Keys, values: Values, columns: Int[Tensor, "rows tokens"], spans: list[Tensor] | None
    ) -> None:
        """Adds the tokens of a forward at the end, in order.

        Args:
            keys: keys of the new tokens.
            values: values of the new tokens.
            columns: their columns, ascending; one row for all where they are the same.
            spans: per row, the indices of the new tokens that are no padding; None if none is.
        """
        batch, _, new, _ = keys.shape
        columns = columns.to(keys.device, torch.int32).expand(batch, -1).unsqueeze(1)
        if self.keys is None:
            self.batch, self.device, self._lanes = batch, keys.device, [Lane(0, 0)]
            if spans is None:  # the first tokens, none of them padding: the tensors themselves are the buffers
                self.keys, self.values = keys.detach().contiguous(), values.detach().contiguous()
                self._columns = columns.contiguous()
                self._settle([new] * batch)
                return
        elif not self._ordered or self.has_holes:
            self.keep(self.columns() >= 0, self.counts)
        before = self.counts
        if spans is None and self.rows_alike:
            after = [count + new for count in before]
            self._reserve(after[0], keys, values)
            self._place(slice(None), slice(before[0], after[0]), keys, values, columns)
        else:
            spans = [torch.arange(new, device=keys.device)] * batch if spans is None else spans
            after = [count + len(span) for count, span in zip(before, spans, strict=True)]
            self._reserve(max(after), keys, values)
            for row, span in enumerate(spans):
                span, target = span.to(keys.device), slice(before[row], after[row])
                rows = slice(row, row + 1)
                self._place(rows, target, keys[rows, :, span], values[rows, :, span], columns[rows, :, span])
        self._settle(after)

    def write(self, key: Keys, value: Values, column: int, room: int | None = None) -> None:
        """Stores the token of a decode step, in an empty position where there is one.

        Args:
            key: keys of one new column.
            value: values of one new column.
            column: its column.
            room: most slots the layer will ever need; None if it may grow for ever.
        """
        positions = [lane.take() for lane in self._lanes]
        self.length = max(lane.extent for lane in self._lanes)
        if self.length > self.capacity:
            self._reserve(self.length, key, value, room)
        assert self.keys is not None and self.values is not None and self._columns is not None
        if len(positions) == 1:
            position = positions[0]
            self.keys[:, :, position - self.packed] = key[:, :, 0]
            self.values[:, :, position - self.packed] = value[:, :, 0]
            self._late[position] = column
        else:
            rows, at = _indices(range(self.batch), key.device), _indices(positions, key.device)
            inner = at - self.packed
            self.keys[rows, :, inner], self.values[rows, :, inner] = key[:, :, 0], value[:, :, 0]
            self._columns[rows, :, at] = column
            if self.scores is not None:
                self.scores[rows, :, at] = torch.nan
        self._ordered = False

    def evict_oldest(self, limits: list[int]) -> None:
        """Empties the positions of the oldest loose tokens in every row that is over its limit.

        Args:
            limits: tokens that each row may hold; one number if it is the same for all.
        """
        if len(self._lanes) == 1 and min(limits) != max(limits) and min(limits) < self._lanes[0].count:
            self.split()
        for row, lane in enumerate(self._lanes):
            limit = limits[row if len(limits) > 1 else 0]
            while lane.count > limit and (position := lane.leave()) is not None:
                if len(self._lanes) == 1:
                    self._late[position] = -1
                else:
                    self._columns[row, :, position] = -1  # type: ignore[index]

    def evict_at(self, positions: Int[Tensor, "batch sets"], rows: list[int]) -> None:
        """Drops one token of some rows, chosen on the device; the row's last token takes its place.

        Args:
            positions: position to drop per row and set.
            rows: rows that drop one.
        """
        self.columns()
        assert self.keys is not None and self._columns is not None
        if positions.shape[1] > self._columns.shape[1]:  # heads part ways here for the first time
            self._columns = self._columns.expand(-1, positions.shape[1], -1).contiguous()
        if len(rows) < self.batch:
            self.split()
        lanes = self._lanes if len(self._lanes) == 1 else [self._lanes[row] for row in rows]
        row, positions = _indices(rows, positions.device)[:, None], positions[rows]
        end = _indices([lane.extent - 1 for lane in lanes], positions.device)[:, None]
        heads = _indices(range(self.keys.shape[1]), positions.device)
        for tensor in (self.keys, self.values, self.scores):
            if tensor is not None:
                tensor[row, heads, positions] = tensor[row, heads, end]
        sets = heads[: self._columns.shape[1]]
        self._columns[row, sets, positions] = self._columns[row, sets, end]
        self._columns[row, sets, end] = -1
        for lane in lanes:
            lane.count, lane.extent = lane.count - 1, lane.extent - 1
        self.length = max(lane.extent for lane in self._lanes)
        self._ordered = False

    def keep(self, mask: Bool[Tensor, "batch sets slots"], counts: list[int], room: int = 0) -> None:
        """Keeps the marked slots, in the order of their columns, and gives the rest back.

        Args:
            mask: slots to keep; `counts[row]` in every set of a row.
            counts: number of kept slots per row.
            room: free slots to allocate beyond them.
        """
        assert self.keys is not None
        columns, scores = self.columns(), self.used_scores()
        kept, capacity = max(counts), max(counts) + room
        latest = torch.iinfo(torch.int32).max
        order = columns.expand(mask.shape).masked_fill(~mask, latest).argsort(dim=-1, stable=True)[..., :kept]
        per_head = order.expand(-1, self.keys.shape[1], -1)
        picked = columns.new_full((*order.shape[:2], capacity), -1)
        picked[..., :kept] = columns.expand(mask.shape).gather(-1, order)
        for row, count in enumerate(counts):
            picked[row, :, count:] = -1
        self._keep_slots(order, counts, capacity)
        if scores is not None:
            self.scores = scores.new_full((*per_head.shape[:2], capacity), torch.nan)
            self.scores[..., :kept] = scores.gather(-1, per_head)
        self._columns = picked
        self._settle(counts)

    def pin(self, pinned: list[int], to_pin: list[int]) -> None:
        """Decides which tokens decode steps never evict by age.

        Args:
            pinned: per row, how many of the oldest tokens.
            to_pin: per row, how many of the tokens to come.
        """
        if not self._ordered or self.has_holes:  # decode steps have reused positions, which tell no age then
            self.keep(self.columns() >= 0, self.counts, room=self.capacity - self.length)
        if len(set(zip(pinned, to_pin, strict=True))) > 1:
            self.split()
        for row, lane in enumerate(self._lanes):
            lane.pin(pinned[row], to_pin[row])

    def score(self, rows: slice, count: int, scores: Importance, add: bool) -> None:
        """Sets the scores of the first `count` slots of some rows, or adds to those they have."""
        assert self.keys is not None
        if self.scores is None:
            shape = (*self.keys.shape[:2], self.capacity)
            self.scores = torch.full(shape, torch.nan, dtype=torch.float32, device=self.keys.device)
        target = self.scores[rows, :, :count]
        target.copy_(target.nan_to_num(nan=0.0) + scores if add else scores)

    def take_back_scores(self, scores: Tensor | None) -> None:
        """Gives the slots in use the scores that they had; later slots have none.

        Args:
            scores: scores of these slots and maybe more, in the same order; None if no slot had any.
        """
        self.scores = None
        if scores is not None and self.keys is not None:
            empty = self.columns() < 0
            self.scores = scores.new_full((*self.keys.shape[:2], self.capacity), torch.nan)
            self.scores[..., : self.length] = scores[..., : self.length].masked_fill(empty, torch.nan)

    def pack(self) -> None:
        """Quantizes what is old enough; nothing here."""

    def replace(self, keys: Keys, values: Values) -> None:
        """Overwrites keys and values of the positions in use."""
        own_keys, own_values = self.slots()
        own_keys.copy_(keys)
        own_values.copy_(values)

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Reorders, repeats or drops rows."""
        if self.keys is None:
            return
        if len(self._lanes) > 1:
            self._lanes = [copy.deepcopy(self._lanes[row]) for row in index.tolist()]
        self.batch = len(index)
        self.columns()
        self._each_tensor(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def crop(self, column: int) -> None:
        """Drops the tokens at `column` and later ones."""
        if self.keys is not None:
            counts = [count - gone for count, gone in zip(self.counts, self.holds_from(column), strict=True)]
            columns = self.columns()
            self.keep((columns >= 0) & (columns < column), counts)

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device (offloading), without waiting for the copy."""
        self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self) -> None:
        """Gives every row a bookkeeping of its own."""
        if len(self._lanes) == 1 and self.batch > 1:
            self.columns()
            self._lanes = [copy.deepcopy(self._lanes[0]) for _ in range(self.batch)]

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _settle(self, counts: list[int]) -> None:
        """Takes note that the tokens lie in order in the first positions; the oldest stay pinned as they were."""
        before = self._lanes if len(self._lanes) == len(counts) else self._lanes * len(counts)
        lanes = []
        for old, count in zip(before, counts, strict=True):
            lane = Lane(count, count)
            if old.by_age:
                lane.pin(old.pinned, old.to_pin + max(0, old.pinned - count))
            lanes.append(lane)
        self._lanes = lanes[:1] if all(lane == lanes[0] for lane in lanes) else lanes
        self.length, self._ordered = max(counts), True

    def _place(self, rows: slice, target: slice, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        assert self.keys is not None and self.values is not None and self._columns is not None
        inner = slice(target.start - self.packed, target.stop - self.packed)
        self.keys[rows, :, inner], self.values[rows, :, inner] = keys, values
        self._columns[rows, :, target] = columns
        if self.scores is not None:
            self.scores[rows, :, target] = torch.nan

    def _reserve(self, slots: int, keys: Tensor, values: Tensor, room: int | None = None) -> None:
        """Grows the buffers to hold `slots`; a single new slot brings 1 % or 16 slots of slack, never past `room`."""
        if self.keys is None or self.values is None or self._columns is None:
            batch, kv_heads = keys.shape[:2]
            self.keys = keys.new_zeros(batch, kv_heads, slots, keys.shape[3])
            self.values = values.new_zeros(batch, kv_heads, slots, values.shape[3])
            self._columns = torch.full((batch, 1, slots), -1, dtype=torch.int32, device=keys.device)
        elif slots > self.capacity:
            capacity = slots if keys.shape[2] > 1 else slots + max(15, slots // 100)
            capacity = max(slots, capacity if room is None else min(capacity, room))
            inner = capacity - self.packed
            self.keys, self.values = _grown(self.keys, inner, 0.0), _grown(self.values, inner, 0.0)
            self._columns = _grown(self._columns.unsqueeze(-1), capacity, -1).squeeze(-1)
            if self.scores is not None:
                self.scores = _grown(self.scores.unsqueeze(-1), capacity, torch.nan).squeeze(-1)

    def _keep_slots(self, order: Int[Tensor, "batch sets slots"], counts: list[int], capacity: int) -> None:
        """Keeps keys and values of the first `counts[row]` positions in `order`, in buffers of `capacity` slots."""
        keys, values = self.slots()
        per_head = order.expand(-1, keys.shape[1], -1)
        self.keys, self.values = gathered(keys, per_head, capacity), gathered(values, per_head, capacity)

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "_columns", "scores", "merger_state"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))


def _indices(numbers: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), device=device)


def gathered(tensor: Tensor, index: Tensor, capacity: int) -> Tensor:
    """Slots of every row and head in the order of `index`, with free slots up to `capacity`."""
    picked = tensor.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[3]))
    return picked if picked.shape[2] == capacity else _grown(picked, capacity, 0.0)


def _grown(tensor: Tensor, capacity: int, fill: float) -> Tensor:
    batch, heads, slots, width = tensor.shape
    grown = tensor.new_empty(batch, heads, capacity, width)
    grown[:, :, :slots] = tensor
    grown[:, :, slots:] = fill
    return grown
