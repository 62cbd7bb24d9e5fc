"""A layer's store whose older tokens are quantized, in whole groups, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.packed import Packed
from kvcompress.cache.sequence import Counts
from kvcompress.cache.store import DenseStore, InUse, by_key_head, fixed, of_heads, rows_at, slots_in_use, with_slots
from kvcompress.kernels import attention_with_slots, decode_attention_codes, merge_attention
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Queries, Values
from kvcompress.policies.faults import policy_errors

_BLOCK = 4096  # slots that attention decodes at a time


class QuantizedStore(DenseStore):
    """Full precision for the most recent tokens, codes for the others.

    The oldest tokens of a row lie quantized in the first slots, each row's own number of them; decode steps write and
    evict among the others alone. A selection copies codes as they are: where it leaves heads of a row with different
    numbers of quantized tokens, the surplus goes back to full precision, to be quantized with a later group.

    Attributes:
        quantizer: the policy.
        layer: index of the decoder layer, for errors.
        packed_rows: slots of each row that are quantized; None if none are.
        coded: the same on the device, `[batch, 1]`; None while there are no buffers for codes.
    """

    def __init__(self, quantizer: Quantizer, layer: int) -> None:
        """Starts empty."""
        super().__init__()
        self.quantizer, self.layer = quantizer, layer
        self.packed_rows: Counts | None = None
        self.coded: Tensor | None = None
        self._packed: tuple[Packed, Packed] | None = None  # keys and values

    @property
    def packed(self) -> int:  # type: ignore[override]
        """Slots that are quantized, in the row that has most."""
        return 0 if self.packed_rows is None else int(self.packed_rows.max())

    @property
    def codes_capacity(self) -> int:
        """Slots that there are codes of, in use or not."""
        return 0 if self._packed is None else self._packed[0].capacity

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, quantized and not."""
        return super().nbytes + sum(packed.nbytes for packed in self._packed or ())

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row that fit, the residual and an unfinished group of them in full precision."""
        full = (self.quantizer.residual + self.quantizer.group) * self.slot_nbytes
        if nbytes <= full:
            return super().slots_within(nbytes)
        of_group = sum(codes.nbytes for codes in self._of_zeros())
        return super().slots_within(full) + (nbytes - full) * self.quantizer.group / of_group

    def blocks(self, used: int) -> Iterator[tuple[Keys, Values]]:
        """Decodes a block at a time, then gives the first `used` slots of full precision."""
        for start, end in self._spans(self.packed):
            yield self._decoded(start, end)
        if used or not self.packed:
            yield from super().blocks(used)

    def quantizable(self, dense: Counts) -> Counts:
        """Tokens of each row, in whole groups, that leave the residual in full precision, in every set of heads."""
        group = self.quantizer.group
        whole: Counts = np.maximum(dense.min(1) - self.quantizer.residual, 0) // group * group
        return whole

    def attend(self, query: Queries, scaling: float, used: InUse) -> Tensor:
        """Attention of one query per row over quantized slots and those in use of full precision."""
        if self._packed is None:
            return super().attend(query, scaling, used)
        (keys, values), read_as = self.dense(), self.quantizer.code_dtype
        if used.length is None or read_as is None or keys.shape[3] != values.shape[3]:
            return self.attend_with_lse(query, scaling, used)[0]
        of_keys, of_values = self._packed
        return decode_attention_codes(
            query,
            of_keys.codes.data.view(read_as),
            of_keys.codes.scale,
            of_keys.codes.shift,
            of_values.codes.data.view(read_as),
            of_values.codes.scale,
            of_values.codes.shift,
            keys,
            values,
            scaling,
            self.coded,
            used.length,
            key_rows=of_keys.scale_rows,
            value_rows=of_values.scale_rows,
        )

    def attend_with_lse(
        self, query: Queries, scaling: float, used: InUse, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same where no kernel reads the codes: a block of them is decoded at a time.

        Blocks are those in use, without a mask where every row has as many; where the host has no say, all there are.
        """
        if self._packed is None:
            return super().attend_with_lse(query, scaling, used, softcap)
        keys, values = (tensor[:, :, : used.width] for tensor in self.dense())
        grouped = by_key_head(query, keys.shape[1])
        parts = _attend(grouped, keys, values, scaling, slots_in_use(used, keys.shape[2]), softcap)
        slots, whole = self.codes_capacity, 0
        if not used.device_only:
            slots, whole = self.packed, 0 if self.packed_rows is None else int(self.packed_rows.min())
        for start, end in self._spans(slots):
            mask = None
            if end > whole:  # some row has fewer
                assert self.coded is not None
                mask = (torch.arange(start, end, device=query.device) < self.coded).unsqueeze(1)
            parts = merge_attention(*parts, *_attend(grouped, *self._decoded(start, end), scaling, mask, softcap))
        return of_heads(query, parts)

    def room(self, slots: Counts) -> Counts:
        """As many, but no more than there can be before they are quantized."""
        most: Counts = np.minimum(slots, self.quantizer.residual + self.quantizer.group)
        return most

    def make_room(self, dense: Counts, later: Counts | None = None) -> None:
        """Makes room for the codes of all tokens of full precision that are older than the residual.

        Args:
            dense: tokens of each row and set in full precision.
            later: how many these may be before long; where buffers have to grow, they get room for so many.
        """
        more, before = self.quantizable(dense), self._packed_rows_of(dense)
        if not more.any() or (self._packed is not None and all(p.has_room(before, more) for p in self._packed)):
            return
        if later is not None:
            more = np.maximum(more, self.quantizable(later))
        if self.coded is None:
            self._count(before)
        keys, values = self._packed or self._without_slots()
        self._packed = (keys.with_room(before, more), values.with_room(before, more))

    def pack(self, dense: Counts) -> Counts:
        """Quantizes the oldest tokens of full precision, as many whole groups of each row as leave the residual.

        Codes that are there stay where they are, unless their buffers have to grow.

        Args:
            dense: tokens of each row and set in full precision, in the order of their age from the first slot on.

        Returns:
            How many of each row were quantized.
        """
        more, before = self.quantizable(dense), self._packed_rows_of(dense)
        count = int(more.max(initial=0))
        if count:
            keys, values = self.dense()
            new = self._encoded(keys[:, :, :count].contiguous(), values[:, :, :count].contiguous())
            if self._packed is None:
                self._packed = (Packed.of(new[0]).fixed(), Packed.of(new[1]).fixed())
            else:
                self.make_room(dense)
                of_keys, of_values = self._packed
                self._packed = (of_keys.appended(new[0], before, more), of_values.appended(new[1], before, more))
            self._count(before + more)
            self._drop_first(more, int((dense - more[:, None]).max()))
        return more

    def buffers(self) -> list[Tensor]:
        """Every tensor that it holds: keys and values, how many slots are quantized, and codes."""
        coded = [] if self.coded is None else [self.coded]
        return [*super().buffers(), *coded, *(tensor for packed in self._packed or () for tensor in packed.tensors())]

    def move_into(self, buffers: list[Tensor]) -> None:
        """Puts what it holds into `buffers` that it had before; codes have not moved."""
        super().move_into(buffers)
        if len(buffers) > 2 and self.coded is not None:
            self.coded = buffers[2].copy_(self.coded)

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
        capacity: Counts,
        first: Int[Tensor, "batch sets packed"] | None = None,
        packed_rows: Counts | None = None,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order: `first` as codes, or all codes where they are, and the rest in full precision."""
        (keys, values), rest = self.dense(), with_slots(rest, capacity)
        if surplus:
            keys, values = (torch.cat(buffers, 2) for buffers in zip(*self.blocks(self.capacity), strict=True))
        else:
            rest = (rest - self.packed).clamp(min=0)
        self._hold(rows_at(keys, rest), rows_at(values, rest))
        if first is not None and self._packed is not None:
            if not first.shape[2]:
                self._packed = self.coded = self.packed_rows = None
            else:
                assert packed_rows is not None
                self._packed = (self._packed[0].picked(first), self._packed[1].picked(first))
                self._count(packed_rows)

    def overwrite(self, keys: Keys, values: Values) -> None:
        """Replaces the slots of full precision; quantized ones stay what they are."""
        super().overwrite(keys[:, :, self.packed :], values[:, :, self.packed :])

    def replace(self, keys: Keys, values: Values) -> None:
        """The same in new buffers."""
        super().replace(keys[:, :, self.packed :].contiguous(), values[:, :, self.packed :].contiguous())

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        super().select_rows(index, rows)
        if self._packed is not None and self.coded is not None:
            self._packed = (self._packed[0].select_rows(index, rows), self._packed[1].select_rows(index, rows))
            coded = self.coded.index_select(0, index.to(self.coded.device))
            self.coded = self.coded.copy_(coded) if len(coded) == len(self.coded) else fixed(coded)
        if self.packed_rows is not None:
            self.packed_rows = self.packed_rows[rows]

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device, without waiting for the copy."""
        super().to(device)
        if self._packed is not None and self.coded is not None:
            keys, values = self._packed
            self._packed = (keys.to(device), values.to(device))
            self.coded = fixed(self.coded.to(device, non_blocking=True))

    def saved(self, used: int) -> dict[str, Any]:
        """All codes, and the first `used` slots of full precision."""
        return {**super().saved(used), "packed": self._packed, "packed_rows": self.packed_rows, "coded": self.coded}

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        super().restore(saved)
        packed, coded, self.packed_rows = saved["packed"], saved["coded"], saved["packed_rows"]
        self._packed = None if packed is None else (packed[0].fixed(), packed[1].fixed())
        self.coded = None if coded is None else fixed(coded)

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _packed_rows_of(self, dense: Counts) -> Counts:
        return np.zeros_like(dense[:, 0]) if self.packed_rows is None else self.packed_rows

    def _count(self, packed_rows: Counts) -> None:
        """Takes note of how many slots of each row are quantized."""
        keys, _ = self.dense()
        self.packed_rows = packed_rows
        self.coded = fixed(torch.as_tensor(packed_rows, device=keys.device).unsqueeze(1).clone())

    def _encoded(self, keys: Keys, values: Values) -> tuple[Codes, Codes]:
        with policy_errors(self.quantizer, self.layer):
            codes = self.quantizer.encode_keys(keys), self.quantizer.encode_values(values)
            if any(one.data.shape[2] != keys.shape[2] for one in codes):
                raise ValueError(f"must give codes for {keys.shape[2]} tokens, got {[o.data.shape[2] for o in codes]}")
        return codes

    def _of_zeros(self) -> tuple[Codes, Codes]:
        """Codes of one group of one row, for their shapes."""
        keys, values = (t.new_zeros(1, t.shape[1], self.quantizer.group, t.shape[3]) for t in self.dense())
        return self._encoded(keys, values)

    def _without_slots(self) -> tuple[Packed, Packed]:
        """Buffers for codes, with no slots yet."""
        batch = len(self.dense()[0])
        keys, values = (
            Packed.of(codes).each(lambda tensor: tensor.new_zeros(batch, tensor.shape[1], 0, tensor.shape[3]))
            for codes in self._of_zeros()
        )
        return keys, values

    def _spans(self, slots: int) -> Iterator[tuple[int, int]]:
        """Where blocks of quantized slots start and end, in whole groups."""
        step = max(1, _BLOCK // self.quantizer.group) * self.quantizer.group
        for start in range(0, slots, step):
            yield start, min(start + step, slots)

    def _decoded(self, start: int, end: int) -> tuple[Keys, Values]:
        """Keys and values of quantized slots; `start` begins a group."""
        assert self._packed is not None
        with policy_errors(self.quantizer, self.layer):
            keys, values = (self.quantizer.decode(packed.part(start, end)) for packed in self._packed)
        return keys, values


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, used: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return attention_with_slots(query, keys.to(query.dtype), values.to(query.dtype), scaling, used, softcap)
