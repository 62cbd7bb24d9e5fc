"""The buffers of one layer: keys, values, the column of every slot, and its score."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.shapes import Columns, Importance, Keys, Values


class DenseStore:
    """Keys and values of one layer in full precision, with room to grow.

    A row's slots lie in the first `counts[row]` positions, except that decode steps may leave holes (column -1) which
    the next token fills. Rows may hold different counts; `length` covers the longest. `ordered` tells whether slots lie
    in the order of their columns.
    """

    def __init__(self) -> None:
        """Starts empty; the first append decides shapes, dtype and device."""
        self.keys: Keys | None = None
        self.values: Values | None = None
        self.columns: Columns | None = None
        self.scores: Float[Tensor, "batch kv_heads slots"] | None = None
        self.counts: list[int] = []
        self.length = 0
        self.ordered = True
        self.device: torch.device | None = None
        self._hole: Int[Tensor, "batch sets"] | None = None
        self._holes = False
        self._bases: tuple[Tensor, Tensor] | None = None

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Slots that are allocated."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def is_even(self) -> bool:
        """Whether every row holds the same number of slots."""
        return all(count == self.counts[0] for count in self.counts)

    @property
    def is_full(self) -> bool:
        """Whether every slot in use holds a token, in every row, so that attention needs no mask."""
        return all(count == self.length for count in self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def index_nbytes(self) -> int:
        """Bytes allocated for columns and scores."""
        return sum(tensor.nbytes for tensor in (self.columns, self.scores) if tensor is not None)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one row's slot over all heads."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def used(self) -> tuple[Keys, Values, Columns]:
        """Keys, values and columns of the slots in use, as views."""
        assert self.keys is not None and self.values is not None and self.columns is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], self.columns[:, :, : self.length]

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, keys: Keys, values: Values, first_column: int, spans: list[Tensor] | None) -> None:
        """Adds the tokens of a forward at the end, in order.

        Args:
            keys: keys of the new columns.
            values: values of the new columns.
            first_column: column of the first of them.
            spans: per row, the indices of the new columns that are no padding; None if none is.
        """
        batch, kv_heads, new, _ = keys.shape
        if self.keys is None:
            self.counts, self.device = [0] * batch, keys.device
            if spans is None:  # the first tokens, all real: the tensors themselves are the buffers
                self.keys, self.values = keys.detach().contiguous(), values.detach().contiguous()
                columns = torch.arange(first_column, first_column + new, dtype=torch.int32, device=keys.device)
                self.columns = columns.expand(batch, 1, new).contiguous()
                self.counts, self.length = [new] * batch, new
                return
        elif not self.ordered or self._holes:
            self.keep(self.columns[:, :, : self.length] >= 0, self.counts)  # type: ignore[index]
        if spans is None and self.is_even:
            self._reserve(self.length + new, keys, values)
            target = slice(self.length, self.length + new)
            self.keys[:, :, target], self.values[:, :, target] = keys, values  # type: ignore[index]
            columns = torch.arange(first_column, first_column + new, dtype=torch.int32, device=keys.device)
            self.columns[:, :, target] = columns  # type: ignore[index]
            self._forget_scores(target)
            self.counts = [count + new for count in self.counts]
        else:
            spans = spans or [torch.arange(new, device=keys.device)] * batch
            self._reserve(max(c + len(s) for c, s in zip(self.counts, spans, strict=True)), keys, values)
            for row, span in enumerate(spans):
                target, span = slice(self.counts[row], self.counts[row] + len(span)), span.to(keys.device)
                self.keys[row, :, target] = keys[row, :, span]  # type: ignore[index]
                self.values[row, :, target] = values[row, :, span]  # type: ignore[index]
                self.columns[row, :, target] = (span + first_column).int()  # type: ignore[index]
                self._forget_scores(target, row)
                self.counts[row] += len(span)
        self.length = max(self.counts)

    def write(self, key: Keys, value: Values, column: int, room: int | None) -> None:
        """Stores the token of a decode step, in a freed slot where there is one.

        Args:
            key: keys of one new column.
            value: values of one new column.
            column: its column.
            room: most slots the layer may ever hold; None if it may grow for ever.
        """
        if self._hole is not None:
            self._put(self._hole, key, value, column)
            self._hole, self._holes = None, False
        elif self._holes or not self.is_even:
            self._fill_first_hole(key, value, column, room)
        else:
            self._reserve(self.length + 1, key, value, room)
            self.keys[:, :, self.length] = key[:, :, 0]  # type: ignore[index]
            self.values[:, :, self.length] = value[:, :, 0]  # type: ignore[index]
            self.columns[:, :, self.length] = column  # type: ignore[index]
            self._forget_scores(slice(self.length, self.length + 1))
            self.length += 1
        self.counts = [count + 1 for count in self.counts]

    def free(self, slot: Int[Tensor, "batch sets"], rows: list[int]) -> None:
        """Empties one slot of some rows (and sets), for the next token to take."""
        assert self.columns is not None
        flat = slot + self._offsets()[1]
        if len(rows) == len(self.counts) and self.is_full:
            self._hole = slot
        else:
            flat, self._hole = flat[rows], None
        self.columns.view(-1).index_fill_(0, flat.reshape(-1), -1)
        self._holes = True
        for row in rows:
            self.counts[row] -= 1

    def keep(self, mask: Bool[Tensor, "batch sets slots"], counts: list[int], room: int = 0) -> None:
        """Keeps the marked slots, in the order of their columns, and gives the rest back.

        Args:
            mask: slots to keep; `counts[row]` in every set of a row.
            counts: number of kept slots per row.
            room: free slots to allocate beyond them.
        """
        keys, values, columns = self.used()
        kept, capacity = max(counts), max(counts) + room
        latest = torch.iinfo(torch.int32).max
        order = columns.expand(mask.shape).masked_fill(~mask, latest).argsort(dim=-1, stable=True)[..., :kept]
        per_head = order.expand(-1, keys.shape[1], -1)
        self.keys, self.values = _gather(keys, per_head, capacity), _gather(values, per_head, capacity)
        picked = columns.new_full((*order.shape[:2], capacity), -1)
        picked[..., :kept] = columns.expand(mask.shape).gather(-1, order)
        for row, count in enumerate(counts):
            picked[row, :, count:] = -1
        if self.scores is not None:
            scores = self.scores.new_full((*per_head.shape[:2], capacity), torch.nan)
            scores[..., :kept] = self.scores[:, :, : self.length].gather(-1, per_head)
            self.scores = scores
        self.columns, self.counts, self.length = picked, list(counts), kept
        self._hole, self._holes, self._bases, self.ordered = None, False, None, True

    def score(self, rows: slice, count: int, scores: Importance, add: bool) -> None:
        """Sets the scores of the first `count` slots of some rows, or adds to those they have."""
        assert self.keys is not None
        if self.scores is None:
            shape = self.keys.shape[:3]
            self.scores = torch.full(shape, torch.nan, dtype=torch.float32, device=self.keys.device)
        target = self.scores[rows, :, :count]
        target.copy_(target.nan_to_num(nan=0.0) + scores if add else scores)

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Reorders, repeats or drops rows."""
        if self.keys is None:
            return
        index = index.to(self.keys.device)
        if not self.is_even or len(index) != len(self.counts):
            self.counts = [self.counts[row] for row in index.tolist()]
        for name in ("keys", "values", "columns", "scores", "_hole"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))
        self._bases = None

    def holds_from(self, column: int) -> list[int]:
        """Number of slots per row, in the set that has fewest, whose token stands at `column` or later."""
        if self.columns is None:
            return []
        return (self.columns[:, :, : self.length] >= column).sum(-1).amin(1).tolist()

    def crop(self, column: int) -> None:
        """Drops the tokens at `column` and later ones."""
        if self.columns is None:
            return
        counts = [count - gone for count, gone in zip(self.counts, self.holds_from(column), strict=True)]
        columns = self.columns[:, :, : self.length]
        self.keep((columns >= 0) & (columns < column), counts)

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device (offloading), without waiting for the copy."""
        for name in ("keys", "values", "columns", "scores", "_hole"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                setattr(self, name, tensor.to(device, non_blocking=True))
                self._bases = None

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _reserve(self, slots: int, keys: Tensor, values: Tensor, room: int | None = None) -> None:
        """Grows the buffers to hold `slots`; a single new slot brings 1 % or 16 slots of slack, never past `room`."""
        if self.keys is None or self.values is None or self.columns is None:
            batch, kv_heads = keys.shape[:2]
            self.keys = keys.new_zeros(batch, kv_heads, slots, keys.shape[3])
            self.values = values.new_zeros(batch, kv_heads, slots, values.shape[3])
            self.columns = torch.full((batch, 1, slots), -1, dtype=torch.int32, device=keys.device)
            return
        if slots <= self.capacity:
            return
        capacity = slots if slots > self.length + 1 else slots + max(15, slots // 100)
        capacity = max(slots, capacity if room is None else min(capacity, room))
        self.keys, self.values = _grown(self.keys, capacity, 0.0), _grown(self.values, capacity, 0.0)
        self.columns = _grown(self.columns.unsqueeze(-1), capacity, -1).squeeze(-1)
        if self.scores is not None:
            self.scores = _grown(self.scores.unsqueeze(-1), capacity, torch.nan).squeeze(-1)
        self._bases = None

    def _fill_first_hole(self, key: Tensor, value: Tensor, column: int, room: int | None) -> None:
        """Stores one token in each row's first empty slot."""
        if max(self.counts) == self.length:
            self._reserve(self.length + 1, key, value, room)
            self.length += 1
        slot = self.columns[:, :, : self.length].argmin(-1)  # type: ignore[index]
        self._put(slot, key, value, column)
        self._holes = True

    def _put(self, slot: Tensor, key: Tensor, value: Tensor, column: int) -> None:
        assert self.keys is not None and self.values is not None and self.columns is not None
        key_offsets, column_offsets = self._offsets()
        flat = (slot + key_offsets).reshape(-1)
        self.keys.view(-1, self.keys.shape[3]).index_copy_(0, flat, key.reshape(-1, key.shape[3]))
        self.values.view(-1, self.values.shape[3]).index_copy_(0, flat, value.reshape(-1, value.shape[3]))
        self.columns.view(-1).index_fill_(0, (slot + column_offsets).reshape(-1), column)
        if self.scores is not None:
            self.scores.view(-1).index_fill_(0, flat, torch.nan)
        self.ordered = False

    def _offsets(self) -> tuple[Tensor, Tensor]:
        """Position of slot 0 of every head, and of every set of columns, in the flattened buffers."""
        if self._bases is None:
            assert self.keys is not None and self.columns is not None
            shapes = (self.keys.shape, self.columns.shape)
            keys, columns = (
                torch.arange(0, batch * heads * slots, slots, device=self.keys.device).view(batch, heads)
                for batch, heads, slots, *_ in shapes
            )
            self._bases = keys, columns
        return self._bases

    def _forget_scores(self, target: slice, row: int | slice = slice(None)) -> None:
        if self.scores is not None:
            self.scores[row, :, target] = torch.nan


def _gather(tensor: Tensor, index: Tensor, capacity: int) -> Tensor:
    gathered = tensor.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[3]))
    return gathered if gathered.shape[2] == capacity else _grown(gathered, capacity, 0.0)


def _grown(tensor: Tensor, capacity: int, fill: float) -> Tensor:
    batch, heads, slots, width = tensor.shape
    grown = tensor.new_empty(batch, heads, capacity, width)
    grown[:, :, :slots] = tensor
    grown[:, :, slots:] = fill
    return grown
