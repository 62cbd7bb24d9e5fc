"""Buffers of codes of rows and heads that have different numbers of them, one after the other without gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.layout import slots_after, sources, starts
from kvcompress.cache.packed import CodeBuffers, changed
from kvcompress.kernels import sent
from kvcompress.kernels.codes import part_of
from kvcompress.policies.context import Codes


@dataclass(frozen=True)
class RaggedPacked(CodeBuffers):
    """Codes of all rows and heads as if those of one row and head, `[1, 1, all slots, width]`.

    Once buffers grow, or tokens are selected, what is in use is copied.

    Attributes:
        slots: slots that each row and head has, in use or not, `[batch, kv_heads]`; whole spans without `scale_rows`.
        start: the first of them, likewise; on the device.
        capacity: slots of the row and head that has most; plain, since compiled steps look at it.
        scales: rows of scales in use, where there are `scale_rows`.
    """

    slots: Counts
    start: Int[Tensor, "batch kv_heads"]
    capacity: int
    scales: int = 0

    @classmethod
    def of(cls, codes: Codes, slots: Counts) -> RaggedPacked:
        """Buffers that are full of some groups, so many slots of each row and head."""
        span = codes.data.shape[2] // codes.scale.shape[2]
        return cls(codes, span, **_layout(slots, codes)).fixed()

    def tensors(self) -> Iterator[Tensor]:
        """All of its buffers."""
        yield from super().tensors()
        yield self.start

    def part(self, start: int, end: int) -> Codes:
        """Codes of some slots of every row and head with the scales that belong to them; `start` begins a group.

        Where a row and head has fewer, any others are in their place.
        """
        codes = self.codes
        return Codes(*part_of(codes.data, codes.scale, codes.shift, self.scale_rows, self.start, start, end), codes.dim)

    @property
    def _unit(self) -> int:
        """Slots that lie, and are copied, together."""
        return self.span if self.scale_rows is None else 1

    # -- groups that come ----------------------------------------------------------------------------------------------

    def has_room(self, before: Counts, more: Counts) -> bool:
        """Whether each row and head finds room for so many slots more than it has by now."""
        return bool((before + more <= self.slots).all()) and self._scales_with(more) <= self.codes.scale.shape[2]

    def with_room(self, before: Counts, more: Counts) -> RaggedPacked:
        """The same with room for so many slots more than each row and head has by now; itself if there is."""
        if self.has_room(before, more):
            return self
        larger = self._laid_out(np.maximum(self.slots, before + more))
        missing = self._scales_with(more) - larger.codes.scale.shape[2]
        if missing > 0:
            codes = changed(larger.codes, larger.codes.data, lambda scale: _with_zeros(scale, missing))
            larger = replace(larger, codes=codes).fixed()
        return larger

    def _scales_with(self, more: Counts) -> int:
        """Rows of scales that are needed for so many slots more, as far as they do not follow from the slots."""
        if self.scale_rows is None:
            return 0
        return self.scales + int(np.broadcast_to(more, self.slots.shape).sum()) // self.span

    def appended(self, new: Codes, before: Counts, more: Counts) -> RaggedPacked:
        """Writes whole groups after each row's and head's own, for which there is room.

        Args:
            new: the groups of all rows and heads, one after the other.
            before: slots that each row and head has by now.
            more: slots of `new` that belong to each.
        """
        at = _on(slots_after(before, more, self.slots), self.codes)
        self.codes.data.index_copy_(2, at, new.data)
        count = new.scale.shape[2]
        if self.scale_rows is None:
            rows = at[:: self.span] // self.span
        else:
            rows = torch.arange(self.scales, self.scales + count, device=at.device)
            self.scale_rows.index_copy_(2, at, rows.repeat_interleave(self.span).to(self.scale_rows.dtype)[None, None])
        for buffer, scale in ((self.codes.scale, new.scale), (self.codes.shift, new.shift)):
            if buffer is not None and scale is not None:
                buffer.index_copy_(2, rows, scale)
        return self if self.scale_rows is None else replace(self, scales=self.scales + count)

    # -- what becomes of those that are there --------------------------------------------------------------------------

    def picked(self, index: Int[Tensor, "batch sets slots"], count: Counts) -> RaggedPacked:
        """The first `count` of some slots of each row and head, copied; waits for the device."""
        slots = np.array(np.broadcast_to(count, self.slots.shape))
        at = sources(self.slots, slots, self.start.device, index)
        return self._laid_out(slots, at) if self.span == 1 else self._with_scales_of(slots, at)

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> RaggedPacked:
        """Reorders, repeats or drops rows; in place where their number, and the slots of each, stay."""
        slots, before = self.slots[rows], list(self.tensors())
        at = sources(self.slots, slots, self.start.device, rows=rows)
        if self.scale_rows is not None and len(rows) < len(self.slots):  # what others needed goes with them
            return self._with_scales_of(slots, at)
        now = self._laid_out(slots, at)
        if slots.shape != self.slots.shape or (slots != self.slots).any():
            return now
        for tensor, moved in zip(before, now.tensors(), strict=True):
            tensor.copy_(moved)
        return self

    def _laid_out(self, slots: Counts, at: Tensor | None = None) -> RaggedPacked:
        """Copies slots, those `at` or the first of each row and head, into buffers in which each has so many."""
        unit, codes = self._unit, self.codes
        if not codes.data.shape[2]:
            total = int(slots.sum())
            data = codes.data.new_zeros(1, 1, total, codes.data.shape[3])
            codes = changed(codes, data, lambda scale: _with_zeros(scale, total // self.span))
            return replace(self, codes=codes, **_layout(slots, codes)).fixed()
        at = sources(self.slots, slots, self.start.device) if at is None else at
        data, rows, scale_rows = codes.data.index_select(2, at), at[::unit] // unit, self.scale_rows
        if scale_rows is None:
            codes = changed(codes, data, lambda scale: scale.index_select(2, rows))
        else:
            codes, scale_rows = changed(codes, data, lambda scale: scale), scale_rows.index_select(2, at)
        return replace(self, codes=codes, scale_rows=scale_rows, **_layout(slots, codes)).fixed()

    def _with_scales_of(self, slots: Counts, at: Tensor) -> RaggedPacked:
        """Copies slots with the rows of scales that any of them needs; waits for the device."""
        rows = at // self.span if self.scale_rows is None else self.scale_rows[0, 0].index_select(0, at)
        used, scale_rows = torch.unique(rows, return_inverse=True)
        codes = changed(self.codes, self.codes.data.index_select(2, at), lambda scale: scale[:, :, used.long()])
        scale_rows = scale_rows.int()[None, None]
        return replace(self, codes=codes, scale_rows=scale_rows, scales=len(used), **_layout(slots, codes)).fixed()

    def checked(self, used: Counts) -> RaggedPacked:
        """The same, read from a file, with a layout that follows from the slots.

        Args:
            used: slots in use of each row and head.

        Raises:
            ValueError: if slots, scales or what connects them do not fit together.
        """
        codes, rows = self.codes, self.scale_rows
        total, scales = int(self.slots.sum()), codes.scale.shape[2]
        alike = self.slots.min(initial=0) >= 0 and codes.data.shape[:3] == (1, 1, total)
        alike = alike and codes.scale.shape[:2] == (1, 1) and (codes.shift is None or codes.shift.shape[2] == scales)
        if rows is None:
            alike = alike and self.span * scales == total and not (self.slots % self.span).any()
        else:
            alike = alike and rows.shape == (1, 1, total) and bool(((rows >= 0) & (rows < scales)).all())
        if not (alike and (used <= self.slots).all()):
            raise ValueError("codes that do not fit together")
        return replace(self, **_layout(self.slots, codes)).fixed()

    def each(self, change: Callable[[Tensor], Tensor]) -> RaggedPacked:
        """The same change to every tensor."""
        return replace(super().each(change), start=change(self.start)).fixed()


def _on(counts: Counts, codes: Codes) -> Tensor:
    return sent(counts, codes.data.device)


def _layout(slots: Counts, codes: Codes) -> dict[str, Any]:
    """What says that each row and head has so many slots."""
    return {"slots": np.array(slots), "start": _on(starts(slots), codes), "capacity": int(slots.max(initial=0))}


def _with_zeros(buffer: Tensor, more: int) -> Tensor:
    """A copy with so many slots more."""
    batch, heads, _, width = buffer.shape
    return torch.cat([buffer, buffer.new_zeros(batch, heads, more, width)], 2)
