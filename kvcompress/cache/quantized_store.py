"""A layer's store whose older tokens are quantized, in whole groups, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.store import DenseStore, gathered
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.faults import policy_errors

_BLOCK = 4096  # slots that attention decodes at a time


@dataclass(frozen=True)
class Packed:
    """The quantized keys, or values, of a layer's first positions.

    Attributes:
        codes: codes of all slots.
        group: slots that one row of scales serves, where there is not one for every slot.
        rows: the row of scales that each slot belongs to; None while they follow from the slots' order.
    """

    codes: Codes
    group: int
    rows: Int[Tensor, "batch kv_heads slots"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and shifts, and of what connects them."""
        return self.codes.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def part(self, batch: slice, start: int, end: int) -> Codes:
        """Codes of some slots with the scales that belong to them; `start` begins a group."""
        codes, data = self.codes, self.codes.data[batch, :, start:end]
        if self.rows is not None:
            index = self.rows[batch, :, start:end].long()
            return _changed(codes, data, lambda scale: _rows_of(scale[batch], index))
        group = codes.data.shape[2] // codes.scale.shape[2]
        return _changed(codes, data, lambda scale: scale[batch, :, start // group : end // group])

    def joined(self, new: Codes) -> Packed:
        """With whole groups appended; older codes stay what they are."""
        old, rows = self.codes, self.rows
        if rows is not None:
            count, slots = new.scale.shape[2], new.data.shape[2]
            added = old.scale.shape[2] + torch.arange(count, device=rows.device, dtype=rows.dtype)
            rows = torch.cat([rows, added.repeat_interleave(slots // count).expand(*rows.shape[:2], -1)], 2)
        shift = None if old.shift is None or new.shift is None else torch.cat([old.shift, new.shift], 2)
        data, scale = torch.cat([old.data, new.data], 2), torch.cat([old.scale, new.scale], 2)
        return replace(self, codes=Codes(data, scale, shift, old.dim), rows=rows)

    def picked(self, index: Int[Tensor, "batch kv_heads slots"]) -> Packed:
        """Some slots, copied as they are, with the scales that any of them needs."""
        codes, rows = self.codes, self.rows
        data = _rows_of(codes.data, index)
        if rows is None and codes.scale.shape[2] == codes.data.shape[2]:
            return replace(self, codes=_changed(codes, data, lambda scale: _rows_of(scale, index)))
        rows = index // self.group if rows is None else rows.gather(2, index)
        used, rows = torch.unique(rows, return_inverse=True)
        return replace(self, codes=_changed(codes, data, lambda scale: scale[:, :, used]), rows=rows.int())

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same change to every tensor."""
        return replace(self, codes=self.codes.each(change), rows=None if self.rows is None else change(self.rows))


class QuantizedStore(DenseStore):
    """Full precision for the most recent tokens, codes for the others.

    The oldest tokens of a row lie quantized in the first positions, as many in every row; only the positions after
    them lie in the buffers of full precision. Decode steps evict there alone. A selection copies codes as they are:
    where it leaves rows or heads of a layer with different numbers of quantized tokens, the surplus goes back to full
    precision, to be quantized with a later group.
    """

    def __init__(self, quantizer: Quantizer, heads: HeadGroup = ALONE, layer: int | None = None) -> None:
        """Starts empty; `layer` is for the words of errors."""
        super().__init__(heads)
        self.quantizer, self.layer = quantizer, layer
        self._packed: tuple[Packed, Packed] | None = None  # keys and values

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, quantized and not."""
        return super().nbytes + sum(packed.nbytes for packed in self._packed or ())

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row that fit, the residual and an unfinished group of them in full precision."""
        assert self.keys is not None and self.values is not None
        full = (self.quantizer.residual + self.quantizer.group) * self.slot_nbytes
        if nbytes <= full:
            return super().slots_within(nbytes)
        group = self.quantizer.group
        empty = [tensor.new_zeros(1, tensor.shape[1], group, tensor.shape[3]) for tensor in (self.keys, self.values)]
        with policy_errors(self.quantizer, self.layer):
            packed = self.quantizer.encode_keys(empty[0]).nbytes + self.quantizer.encode_values(empty[1]).nbytes
        return super().slots_within(full) + (nbytes - full) * group / packed

    def slots(self) -> tuple[Keys, Values]:
        """Keys and values of the positions in use; a copy in full precision where some are quantized."""
        blocks = list(self.blocks(slice(None), self.length))
        if len(blocks) == 1:
            return blocks[0]
        keys, values = zip(*blocks, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def blocks(self, rows: slice, end: int) -> Iterator[tuple[Keys, Values]]:
        """Decodes a block at a time, then gives the positions of full precision; `end` covers all that is quantized."""
        assert self.keys is not None and self.values is not None
        step = max(1, _BLOCK // self.quantizer.group) * self.quantizer.group
        for start in range(0, self.packed, step):
            yield self._decoded(rows, start, min(start + step, self.packed))
        if end > self.packed or not self.packed:
            yield self.keys[rows, :, : end - self.packed], self.values[rows, :, : end - self.packed]

    def pack(self) -> None:
        """Quantizes the oldest tokens of full precision, as many whole groups as leave the residual in every row."""
        quantizer = self.quantizer
        new = (min(self.counts, default=0) - quantizer.residual - self.packed) // quantizer.group * quantizer.group
        if new <= 0:
            return
        if not self._ordered or self.has_holes:
            self.keep(self.columns() >= 0, self.counts, room=self.capacity - self.length)
        assert self.keys is not None and self.values is not None
        with policy_errors(quantizer, self.layer):
            codes = (
                quantizer.encode_keys(self.keys[:, :, :new].contiguous()),
                quantizer.encode_values(self.values[:, :, :new].contiguous()),
            )
            if self._packed is None:
                self._packed = (Packed(codes[0], quantizer.group), Packed(codes[1], quantizer.group))
            else:
                self._packed = (self._packed[0].joined(codes[0]), self._packed[1].joined(codes[1]))
        self.keys, self.values = self.keys[:, :, new:].clone(), self.values[:, :, new:].clone()
        self.packed += new
        for lane in self._lanes:
            if lane.by_age:  # what is quantized no longer leaves by age
                lane.pin(max(lane.pinned, self.packed), lane.to_pin)

    def pin(self, pinned: list[int], to_pin: list[int]) -> None:
        """As for any store, and what is quantized never leaves by age."""
        super().pin([max(count, self.packed) for count in pinned], to_pin)

    def replace(self, keys: Keys, values: Values) -> None:
        """Overwrites the positions of full precision; quantized ones stay what they are."""
        assert self.keys is not None and self.values is not None
        inner = self.length - self.packed
        self.keys[:, :, :inner] = keys[:, :, self.packed :]
        self.values[:, :, :inner] = values[:, :, self.packed :]

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _decoded(self, rows: slice, start: int, end: int) -> tuple[Keys, Values]:
        """Keys and values of quantized positions; `start` begins a group."""
        assert self._packed is not None
        with policy_errors(self.quantizer, self.layer):
            keys, values = (self.quantizer.decode(packed.part(rows, start, end)) for packed in self._packed)
        return keys, values

    def _keep_slots(self, order: Int[Tensor, "batch sets slots"], counts: list[int], capacity: int) -> None:
        """Gathers codes where slots stay quantized, the rest in full precision."""
        if self._packed is None:
            super()._keep_slots(order, counts, capacity)
            return
        assert self.keys is not None and self.values is not None
        per_head = order.expand(-1, self.keys.shape[1], -1)
        real = torch.arange(order.shape[2], device=order.device) < torch.tensor(counts, device=order.device)[:, None]
        quantized = ((order < self.packed) & real.unsqueeze(1)).sum(-1)
        if self.heads_part:  # as many in every head of the layer, wherever it is
            quantized = self.heads.gather(quantized)
        stay = int(quantized.min())
        alike = stay == int(quantized.max())
        keys, values = (self.keys, self.values) if alike else self.slots()
        rest = (per_head[..., stay:] - self.packed).clamp(min=0) if alike else per_head[..., stay:]
        self.keys, self.values = (gathered(tensor, rest, capacity - stay) for tensor in (keys, values))
        if stay < self.packed:
            first = per_head[..., :stay]
            self._packed = (self._packed[0].picked(first), self._packed[1].picked(first)) if stay else None
        self.packed = stay

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._each_tensor(change)
        if self._packed is not None:
            self._packed = (self._packed[0].each(change), self._packed[1].each(change))


def _changed(codes: Codes, data: Tensor, change: Callable[[Tensor], Tensor]) -> Codes:
    """Other codes, and a change to both scales and shifts."""
    return Codes(data, change(codes.scale), None if codes.shift is None else change(codes.shift), codes.dim)


def _rows_of(tensor: Tensor, index: Int[Tensor, "batch kv_heads slots"]) -> Tensor:
    """Slots, or rows of scales, of every row and head in the order of `index`."""
    return tensor.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[3]))
