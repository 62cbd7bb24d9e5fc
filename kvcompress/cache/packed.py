"""Buffers of codes: the quantized keys, or values, of a layer's first slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.store import fixed, grown, rows_at, with_rows
from kvcompress.kernels import sent
from kvcompress.policies.context import Codes

_Buffers = TypeVar("_Buffers", bound="CodeBuffers")


@dataclass(frozen=True)
class CodeBuffers:
    """The quantized keys, or values, of a layer's first slots, in buffers that may have more slots than are in use.

    What is in use never changes where it lies: groups are written after it, and what moves is copied.

    Attributes:
        codes: codes of all slots.
        span: neighbouring slots that one row of scales serves.
        scale_rows: the row of scales that each slot belongs to; None while they follow from the slots' order.
    """

    codes: Codes
    span: int
    scale_rows: Int[Tensor, "rows heads slots"] | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and shifts, and of what connects them."""
        return self.codes.nbytes + (0 if self.scale_rows is None else self.scale_rows.nbytes)

    def tensors(self) -> Iterator[Tensor]:
        """All of its buffers."""
        for tensor in (self.codes.data, self.codes.scale, self.codes.shift, self.scale_rows):
            if tensor is not None:
                yield tensor

    def each(self: _Buffers, change: Callable[[Tensor], Tensor]) -> _Buffers:
        """The same change to every tensor."""
        rows = None if self.scale_rows is None else change(self.scale_rows)
        return replace(self, codes=self.codes.each(change), scale_rows=rows).fixed()

    def to(self: _Buffers, device: torch.device) -> _Buffers:
        """On a device, without waiting for the copy."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def fixed(self: _Buffers) -> _Buffers:
        """The same, of which compiled decode steps know that it stays where it is."""
        for tensor in self.tensors():
            fixed(tensor)
        return self


@dataclass(frozen=True)
class Packed(CodeBuffers):
    """Codes of rows and heads that all have room for as many, `[batch, kv_heads, slots, width]`.

    Attributes:
        scales: rows of scales in use per row, `[batch, 1]`, where there are `scale_rows`.
    """

    scales: Counts | None = None

    @classmethod
    def of(cls, codes: Codes) -> Packed:
        """Buffers that are full of some groups."""
        return cls(codes, codes.data.shape[2] // codes.scale.shape[2])

    @property
    def capacity(self) -> int:
        """Slots that are allocated."""
        return self.codes.data.shape[2]

    def part(self, start: int, end: int) -> Codes:
        """Codes of some slots with the scales that belong to them; `start` begins a group."""
        codes, data = self.codes, self.codes.data[:, :, start:end]
        if self.scale_rows is not None:
            index = self.scale_rows[:, :, start:end].long()
            return changed(codes, data, lambda scale: rows_at(scale, index))
        return changed(codes, data, lambda scale: scale[:, :, start // self.span : end // self.span])

    # -- groups that come ----------------------------------------------------------------------------------------------

    def has_room(self, before: Counts, more: Counts) -> bool:
        """Whether each row finds room for so many slots more than it has by now, `[batch, 1]`."""
        slots, scales = self._needed(before, more)
        return slots <= self.capacity and scales <= self.codes.scale.shape[2]

    def with_room(self, before: Counts, more: Counts) -> Packed:
        """The same with room for so many slots more than each row has by now; itself if there is."""
        if self.has_room(before, more):
            return self
        slots, scales = self._needed(before, more)
        scale_rows = self.scale_rows
        if scale_rows is not None:
            scale_rows = _larger(scale_rows.unsqueeze(3), slots).squeeze(3)
        codes = changed(self.codes, _larger(self.codes.data, slots), lambda scale: _larger(scale, scales))
        return replace(self, codes=codes, scale_rows=scale_rows).fixed()

    def _needed(self, before: Counts, more: Counts) -> tuple[int, int]:
        """Slots, and rows of scales."""
        slots = int((before + more).max())
        return slots, slots // self.span if self.scales is None else int((self.scales + more // self.span).max())

    def appended(self, new: Codes, before: Counts, more: Counts) -> Packed:
        """Writes whole groups after each row's own, for which there is room.

        Args:
            new: the groups, in their order.
            before: slots that each row has by now, `[batch, 1]`.
            more: slots of `new` that each row takes.
        """
        _put(self.codes.data, new.data, before, more)
        count, first = more // self.span, before // self.span if self.scales is None else self.scales
        for buffer, scale in ((self.codes.scale, new.scale), (self.codes.shift, new.shift)):
            if buffer is not None and scale is not None:
                _put(buffer, scale, first, count)
        if self.scale_rows is None:
            return self
        rows = self.scale_rows
        numbers = torch.arange(int(count.max()), device=rows.device, dtype=rows.dtype).repeat_interleave(self.span)
        numbers = numbers + sent(first, rows.device, rows.dtype).unsqueeze(-1)
        _put(rows.unsqueeze(3), numbers.unsqueeze(3).expand(-1, rows.shape[1], -1, -1), before, more)
        return replace(self, scales=first + count)

    # -- what becomes of those that are there --------------------------------------------------------------------------

    def picked(self, index: Int[Tensor, "batch sets slots"], count: Counts) -> Packed:
        """Some slots, copied as they are, with the scales that any of them needs; waits for the device.

        Args:
            index: the slots.
            count: how many of them mean something per row; room stays for as many as in the row that has most.
        """
        codes, heads = self.codes, self.codes.data.shape[1]
        data = rows_at(codes.data, index)
        if self.span == 1:
            return replace(self, codes=changed(codes, data, lambda scale: rows_at(scale, index))).fixed()
        whole = index.expand(-1, heads, -1)
        scale_rows = whole // self.span if self.scale_rows is None else self.scale_rows.gather(2, whole)
        used, scale_rows = torch.unique(scale_rows, return_inverse=True)
        codes = changed(codes, data, lambda scale: scale[:, :, used])
        scales = np.full((len(data), 1), len(used), dtype=np.int64)
        return replace(self, codes=codes, scale_rows=scale_rows.int(), scales=scales).fixed()

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> Packed:
        """Reorders, repeats or drops rows; in place where their number stays."""
        scales = None if self.scales is None else self.scales[rows]
        return replace(self.each(lambda tensor: with_rows(tensor, index)), scales=scales)


def changed(codes: Codes, data: Tensor, change: Callable[[Tensor], Tensor]) -> Codes:
    """Other codes, and a change to both scales and shifts."""
    return Codes(data, change(codes.scale), None if codes.shift is None else change(codes.shift), codes.dim)


def _larger(buffer: Tensor, slots: int) -> Tensor:
    return grown(buffer, slots) if slots > buffer.shape[2] else buffer


def _put(buffer: Tensor, new: Tensor, first: Counts, count: Counts) -> None:
    """Writes the first `count[row]` slots of `new` into those of a buffer from `first[row]` on, row by row at once."""
    most, begins = int(count.max()), int(first.min())
    if (first == begins).all() and (count == most).all():
        buffer[:, :, begins : begins + most] = new[:, :, :most]
        return
    begin, slots = (sent(counts, buffer.device) for counts in (first, count))
    source = torch.arange(most, device=buffer.device).minimum(slots - 1)  # -1 in rows that get nothing
    target = (begin + source).clamp(min=0).unsqueeze(1)
    fresh, there = rows_at(new, source.clamp(min=0).unsqueeze(1)), rows_at(buffer, target)
    fresh = torch.where((source >= 0)[:, None, :, None], fresh, there)
    buffer.scatter_(2, target.unsqueeze(3).expand(fresh.shape), fresh)
