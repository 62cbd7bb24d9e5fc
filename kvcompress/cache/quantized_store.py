"""A layer's store whose older tokens are quantized, in whole groups, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.sequence import Counts
from kvcompress.cache.store import DenseStore, rows_at
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.faults import policy_errors

_BLOCK = 4096  # slots that attention decodes at a time


@dataclass(frozen=True)
class Packed:
    """The quantized keys, or values, of a layer's first slots.

    Attributes:
        codes: codes of all slots.
        group: slots that one row of scales serves, where there is not one for every slot.
        scale_rows: the row of scales that each slot belongs to; None while they follow from the slots' order.
    """

    codes: Codes
    group: int
    scale_rows: Int[Tensor, "batch kv_heads slots"] | None = None

    @property
    def slots(self) -> int:
        """Slots in the row that has most."""
        return self.codes.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and shifts, and of what connects them."""
        return self.codes.nbytes + (0 if self.scale_rows is None else self.scale_rows.nbytes)

    @property
    def scale_for_each(self) -> bool:
        """Whether every slot has a row of scales of its own."""
        return self.scale_rows is None and self.codes.scale.shape[2] == self.slots

    def part(self, start: int, end: int) -> Codes:
        """Codes of some slots with the scales that belong to them; `start` begins a group."""
        codes, data = self.codes, self.codes.data[:, :, start:end]
        if self.scale_rows is not None:
            index = self.scale_rows[:, :, start:end].long()
            return _changed(codes, data, lambda scale: rows_at(scale, index))
        group = self.slots // codes.scale.shape[2]
        return _changed(codes, data, lambda scale: scale[:, :, start // group : end // group])

    def joined(self, new: Packed, counts: Counts, more: Counts) -> Packed:
        """With whole groups put after each row's own; older codes stay what they are.

        Args:
            new: the groups, in their order.
            counts: slots that each row has by now.
            more: slots of `new` that each row takes.
        """
        if (counts == counts[0]).all() and (more == more[0]).all():
            return self._end_to_end(new)
        slots, device = int((counts + more).max()), self.codes.data.device
        place = torch.arange(slots, device=device)
        begin = torch.as_tensor(counts, device=device)[:, None]
        source = torch.where(place < begin, place, self.slots + place - begin)  # in both, one after the other
        return self._end_to_end(new).picked(source.clamp(max=self.slots + new.slots - 1).unsqueeze(1), compact=False)

    def _end_to_end(self, new: Packed) -> Packed:
        old, scale_rows = self.codes, self.scale_rows
        if scale_rows is not None:
            count, slots = new.codes.scale.shape[2], new.slots
            added = old.scale.shape[2] + torch.arange(count, device=scale_rows.device, dtype=scale_rows.dtype)
            added = added.repeat_interleave(slots // count).expand(*scale_rows.shape[:2], -1)
            scale_rows = torch.cat([scale_rows, added], 2)
        shift = None if old.shift is None or new.codes.shift is None else torch.cat([old.shift, new.codes.shift], 2)
        data, scale = torch.cat([old.data, new.codes.data], 2), torch.cat([old.scale, new.codes.scale], 2)
        return replace(self, codes=Codes(data, scale, shift, old.dim), scale_rows=scale_rows)

    def picked(self, index: Int[Tensor, "batch sets slots"], compact: bool = True) -> Packed:
        """Some slots, copied as they are, with the scales that any of them needs.

        Args:
            index: the slots.
            compact: whether to drop the scales that none of them needs, which waits for the device.
        """
        codes, heads = self.codes, self.codes.data.shape[1]
        data = rows_at(codes.data, index)
        if self.scale_for_each:
            return replace(self, codes=_changed(codes, data, lambda scale: rows_at(scale, index)))
        whole = index.expand(-1, heads, -1)
        if self.scale_rows is None and not compact and index.shape[2] % self.group == 0:  # whole groups stay together
            groups = index[..., :: self.group] // self.group
            return replace(self, codes=_changed(codes, data, lambda scale: rows_at(scale, groups)))
        scale_rows = whole // self.group if self.scale_rows is None else self.scale_rows.gather(2, whole)
        if compact:
            used, scale_rows = torch.unique(scale_rows, return_inverse=True)
            codes = _changed(codes, data, lambda scale: scale[:, :, used])
        else:
            codes = _changed(codes, data, lambda scale: scale)
        return replace(self, codes=codes, scale_rows=scale_rows.int())

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same change to every tensor."""
        rows = None if self.scale_rows is None else change(self.scale_rows)
        return replace(self, codes=self.codes.each(change), scale_rows=rows)


class QuantizedStore(DenseStore):
    """Full precision for the most recent tokens, codes for the others.

    The oldest tokens of a row lie quantized in the first slots, each row's own number of them; decode steps write and
    evict among the others alone. A selection copies codes as they are: where it leaves heads of a row with different
    numbers of quantized tokens, the surplus goes back to full precision, to be quantized with a later group.
    """

    def __init__(self, quantizer: Quantizer, layer: int) -> None:
        """Starts empty.

        Args:
            quantizer: the policy.
            layer: index of the decoder layer, for errors.
        """
        super().__init__()
        self.quantizer, self.layer = quantizer, layer
        self.packed_rows: Counts | None = None
        self._packed: tuple[Packed, Packed] | None = None  # keys and values

    @property
    def packed(self) -> int:  # type: ignore[override]
        """Slots that are quantized, in the row that has most."""
        return 0 if self._packed is None else self._packed[0].slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, quantized and not."""
        return super().nbytes + sum(packed.nbytes for packed in self._packed or ())

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row that fit, the residual and an unfinished group of them in full precision."""
        keys, values = self.dense()
        full = (self.quantizer.residual + self.quantizer.group) * self.slot_nbytes
        if nbytes <= full:
            return super().slots_within(nbytes)
        group = self.quantizer.group
        empty = [tensor.new_zeros(1, tensor.shape[1], group, tensor.shape[3]) for tensor in (keys, values)]
        with policy_errors(self.quantizer, self.layer):
            packed = self.quantizer.encode_keys(empty[0]).nbytes + self.quantizer.encode_values(empty[1]).nbytes
        return super().slots_within(full) + (nbytes - full) * group / packed

    def blocks(self, used: int) -> Iterator[tuple[Keys, Values]]:
        """Decodes a block at a time, then gives the first `used` slots of full precision."""
        step = max(1, _BLOCK // self.quantizer.group) * self.quantizer.group
        for start in range(0, self.packed, step):
            yield self._decoded(start, min(start + step, self.packed))
        if used or not self.packed:
            yield from super().blocks(used)

    def quantizable(self, dense_rows: Counts) -> Counts:
        """Tokens of each row, in whole groups, that leave the residual in full precision."""
        group = self.quantizer.group
        whole: Counts = np.maximum(dense_rows - self.quantizer.residual, 0) // group * group
        return whole

    def pack(self, dense_rows: Counts) -> Counts:
        """Quantizes the oldest tokens of full precision, as many whole groups of each row as leave the residual.

        Args:
            dense_rows: tokens of each row in full precision, in the order of their age from the first slot on.

        Returns:
            How many of each row were quantized.
        """
        more, quantizer = self.quantizable(dense_rows), self.quantizer
        count = int(more.max(initial=0))
        if count:
            keys, values = self.dense()
            with policy_errors(quantizer, self.layer):
                new = (
                    Packed(quantizer.encode_keys(keys[:, :, :count].contiguous()), quantizer.group),
                    Packed(quantizer.encode_values(values[:, :, :count].contiguous()), quantizer.group),
                )
                assert all(packed.slots == count for packed in new)
            before = np.zeros(len(more), dtype=np.int64) if self.packed_rows is None else self.packed_rows
            if self._packed is None:
                self._packed = new
            else:
                self._packed = tuple(  # type: ignore[assignment]
                    old.joined(group, before, more) for old, group in zip(self._packed, new, strict=True)
                )
            self.packed_rows = before + more
            self._drop_first(more, int((dense_rows - more).max()))
        return more

    def _drop_first(self, more: Counts, left: int) -> None:
        """Gives back the first slots of full precision, each row's own number of them; so many are left in use."""
        keys, values = self.dense()
        if (more == more[0]).all():
            count = int(more[0])
            self._hold(keys[:, :, count:].clone(), values[:, :, count:].clone())
        else:
            order = torch.arange(left, device=keys.device) + torch.as_tensor(more, device=keys.device)[:, None]
            order = order.clamp(max=self.capacity - 1).unsqueeze(1)
            self._hold(rows_at(keys, order), rows_at(values, order))

    def take(
        self,
        rest: Int[Tensor, "batch sets slots"],
        first: Int[Tensor, "batch sets packed"] | None = None,
        packed_rows: Counts | None = None,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order: `first` as codes, or all codes where they are, and the rest in full precision."""
        keys, values = self.dense()
        if surplus:
            keys, values = (torch.cat(buffers, 2) for buffers in zip(*self.blocks(self.capacity), strict=True))
        else:
            rest = (rest - self.packed).clamp(min=0)
        self._hold(rows_at(keys, rest), rows_at(values, rest))
        if first is not None and self._packed is not None:
            stay = first.shape[2]
            self._packed = (self._packed[0].picked(first), self._packed[1].picked(first)) if stay else None
            self.packed_rows = packed_rows if stay else None

    def overwrite(self, keys: Keys, values: Values) -> None:
        """Replaces the slots of full precision; quantized ones stay what they are."""
        super().overwrite(keys[:, :, self.packed :], values[:, :, self.packed :])

    def replace(self, keys: Keys, values: Values) -> None:
        """The same in new buffers."""
        super().replace(keys[:, :, self.packed :].contiguous(), values[:, :, self.packed :].contiguous())

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        super().select_rows(index, rows)
        if self._packed is not None and self.packed_rows is not None:
            self._each_packed(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
            self.packed_rows = self.packed_rows[rows]

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device, without waiting for the copy."""
        super().to(device)
        self._each_packed(lambda tensor: tensor.to(device, non_blocking=True))

    def saved(self, used: int) -> dict[str, Any]:
        """All codes, and the first `used` slots of full precision."""
        return {**super().saved(used), "packed": self._packed, "packed_rows": self.packed_rows}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `saved` gave."""
        super().restore(saved)
        self._packed, self.packed_rows = saved["packed"], saved["packed_rows"]

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _each_packed(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._packed is not None:
            self._packed = (self._packed[0].each(change), self._packed[1].each(change))

    def _decoded(self, start: int, end: int) -> tuple[Keys, Values]:
        """Keys and values of quantized slots; `start` begins a group."""
        assert self._packed is not None
        with policy_errors(self.quantizer, self.layer):
            keys, values = (self.quantizer.decode(packed.part(start, end)) for packed in self._packed)
        return keys, values


def _changed(codes: Codes, data: Tensor, change: Callable[[Tensor], Tensor]) -> Codes:
    """Other codes, and a change to both scales and shifts."""
    return Codes(data, change(codes.scale), None if codes.shift is None else change(codes.shift), codes.dim)
