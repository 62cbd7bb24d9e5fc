"""A layer's store whose older tokens are quantized, in whole groups, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.coder import Coder
from kvcompress.cache.counts import Counts
from kvcompress.cache.packed import Packed
from kvcompress.cache.store import DenseStore, InUse, by_key_head, fixed, of_heads, rows_at, slots_in_use, with_rows
from kvcompress.kernels import attention_with_slots, decode_attention_codes, merge_attention, sent
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Queries, Values


class QuantizedStore(DenseStore):
    """Full precision for the most recent tokens, codes for the others.

    The oldest tokens of a row lie quantized in the first slots, each row's own number of them; decode steps write and
    evict among the others alone. A selection copies codes as they are: where it leaves heads of a row with different
    numbers of quantized tokens, the surplus goes back to full precision, to be quantized with a later group.

    Attributes:
        quantizer: the policy.
        coder: what asks it.
        by_head: whether every head has its own number of quantized slots.
        packed_rows: slots of each row that are quantized, `[batch, sets]`, one set where all heads have as many; None
            if none are.
        coded: the same on the device; None while there are no buffers for codes.
    """

    by_head = False
    coded: Tensor | None
    _packed: tuple[Any, Any] | None  # keys and values, `Packed` or what stands for it

    def __init__(self, quantizer: Quantizer, layer: int) -> None:
        """Starts empty."""
        super().__init__()
        self.quantizer, self.coder = quantizer, Coder(quantizer, layer)
        self.packed_rows: Counts | None = None
        self.coded = self._packed = None

    @property
    def packed(self) -> int:  # type: ignore[override]
        """Slots that are quantized, in the row and head that has most."""
        return 0 if self.packed_rows is None else int(self.packed_rows.max())

    @property
    def codes_capacity(self) -> int:
        """Slots that there are codes of, in use or not."""
        return 0 if self._packed is None else int(self._packed[0].capacity)

    @property
    def most_dense(self) -> int:
        """Tokens of a row and head in full precision, before some of them are quantized."""
        return self.quantizer.residual + self.quantizer.group

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, quantized and not."""
        return super().nbytes + sum(int(packed.nbytes) for packed in self._packed or ())

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row that fit, the residual and what waits to be quantized in full precision.

        A token more takes less the more there are, so heads that hold different numbers of them take no more together.
        """
        full = self.most_dense * self.slot_nbytes
        if nbytes <= full:
            return super().slots_within(nbytes)
        of_group = sum(codes.nbytes for codes in self._group_of_zeros(self.kv_heads))
        return super().slots_within(full) + (nbytes - full) * self.quantizer.group / of_group

    def blocks(self, used: int) -> Iterator[tuple[Keys, Values]]:
        """Decodes a block at a time, then gives the first `used` slots of full precision."""
        for start, end in self.coder.blocks(self.packed):
            yield self._decoded(start, end)
        if used or not self.packed:
            yield from super().blocks(used)

    def quantizable(self, dense: Counts) -> Counts:
        """Tokens of each row, in whole groups, that leave the residual in full precision, in every set of heads."""
        group = self.quantizer.group
        of_sets = dense if self.by_head else dense.min(1, keepdims=True)
        whole: Counts = np.maximum(of_sets - self.quantizer.residual, 0) // group * group
        return whole

    def attend(self, query: Queries, scaling: float, used: InUse) -> Tensor:
        """Attention of one query per row over quantized slots and those in use of full precision."""
        if self._packed is None:
            return super().attend(query, scaling, used)
        ((keys, values), layout), read_as = self._in_place(), self.quantizer.code_dtype
        if used.length is None or read_as is None or keys.shape[-1] != values.shape[-1]:
            return self.attend_with_lse(query, scaling, used)[0]
        of_keys, of_values = self._packed
        layout |= {"key_rows": of_keys.scale_rows, "value_rows": of_values.scale_rows}
        codes = (*_as_read(of_keys.codes, read_as), *_as_read(of_values.codes, read_as))
        return decode_attention_codes(query, *codes, keys, values, scaling, self.coded, used.length, **layout)

    def _in_place(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Keys and values in full precision as they lie, and what a kernel has to be told of where slots begin."""
        return self.dense(), {}

    def attend_with_lse(
        self, query: Queries, scaling: float, used: InUse, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same where no kernel reads the codes: a block of them is decoded at a time.

        Blocks are those in use, without a mask where every row has as many; where the host has no say, all there are.
        """
        if self._packed is None:
            return super().attend_with_lse(query, scaling, used, softcap)
        keys, values = self.padded(self.capacity if used.width is None else used.width)
        grouped = by_key_head(query, keys.shape[1])
        parts = attention_with_slots(grouped, keys, values, scaling, slots_in_use(used, keys.shape[2]), softcap)
        slots, whole = self.codes_capacity, 0
        if not used.device_only:
            slots, whole = self.packed, 0 if self.packed_rows is None else int(self.packed_rows.min())
        for start, end in self.coder.blocks(slots):
            mask = None
            if end > whole:  # some row has fewer
                assert self.coded is not None  # [batch, sets]
                mask = torch.arange(start, end, device=query.device) < self.coded.unsqueeze(-1)
            part = attention_with_slots(grouped, *self._decoded(start, end), scaling, mask, softcap)
            parts = merge_attention(*parts, *part)
        return of_heads(query, parts)

    def room(self, slots: Counts) -> Counts:
        """As many, but no more than there can be before they are quantized."""
        most: Counts = np.minimum(slots, self.most_dense)
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
            self._count_packed(before)
        self._packed = self._packed or self._without_slots()
        self._change_codes(lambda packed: packed.with_room(before, more))

    def pack(self, dense: Counts) -> Counts:
        """Quantizes the oldest tokens of full precision, as many whole groups of each row as leave the residual.

        Codes that are there stay where they are, unless their buffers have to grow.

        Args:
            dense: tokens of each row and set in full precision, in the order of their age from the first slot on.

        Returns:
            How many of each row and set were quantized.
        """
        more, before = self.quantizable(dense), self._packed_rows_of(dense)
        if more.any():
            new = self.coder.encode(*self._oldest(more))
            if self._packed is None:
                self._packed = self._packed_of(new[0], more), self._packed_of(new[1], more)
            else:
                self.make_room(dense)
                of_keys, of_values = self._packed
                self._packed = of_keys.appended(new[0], before, more), of_values.appended(new[1], before, more)
            self._count_packed(before + more)
            self._drop_first(more, dense - more)
        return more

    def buffers(self) -> list[Tensor]:
        """Every tensor that it holds: keys and values, how many slots are quantized, and codes."""
        coded = [] if self.coded is None else [self.coded]
        return [*super().buffers(), *coded, *(tensor for packed in self._packed or () for tensor in packed.tensors())]

    def holders(self) -> tuple[object, ...]:
        """As of a dense store; codes lie where they are for as long as their buffers' object is the same."""
        return (*super().holders(), self.coded, *(self._packed or ()))

    def move_into(self, before: DenseStore) -> None:
        """Puts what it holds into the buffers that it had before; codes have not moved."""
        super().move_into(before)
        if isinstance(before, QuantizedStore) and before.coded is not None and self.coded is not None:
            self.coded = before.coded.copy_(self.coded)

    def take(
        self,
        rest: Int[Tensor, "batch sets slots"],
        capacity: Counts,
        first: Int[Tensor, "batch sets packed"] | None = None,
        packed_rows: Counts | None = None,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order: `first` as codes, or all codes where they are, and the rest in full precision."""
        if surplus:
            self._hold(*(torch.cat(buffers, 2) for buffers in zip(*self.blocks(self.capacity), strict=True)))
        else:
            rest = (rest - self.packed).clamp(min=0)
        super().take(rest, capacity)
        if first is not None and self._packed is not None:
            if not first.shape[2]:
                self._packed = self.coded = self.packed_rows = None
            else:
                assert packed_rows is not None
                self._change_codes(lambda packed: packed.picked(first, packed_rows))
                self._count_packed(packed_rows)

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
            self._change_codes(lambda packed: packed.select_rows(index, rows))
            self.coded = with_rows(self.coded, index)
        if self.packed_rows is not None:
            self.packed_rows = self.packed_rows[rows]

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device, without waiting for the copy."""
        super().to(device)
        if self._packed is not None and self.coded is not None:
            self._change_codes(lambda packed: packed.to(device))
            self.coded = fixed(self.coded.to(device, non_blocking=True))

    def saved(self, used: int) -> dict[str, Any]:
        """All codes, and the first `used` slots of full precision."""
        return {**super().saved(used), "packed": self._packed, "packed_rows": self.packed_rows, "coded": self.coded}

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        super().restore(saved)
        self._packed, coded, self.packed_rows = saved["packed"], saved["coded"], saved["packed_rows"]
        self._change_codes(lambda packed: packed.fixed())
        self.coded = None if coded is None else fixed(coded)

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _change_codes(self, change: Callable[[Any], Any]) -> None:
        """The same change to the codes of keys and of values, if there are any."""
        if self._packed is not None:
            keys, values = self._packed
            self._packed = change(keys), change(values)

    def _packed_rows_of(self, dense: Counts) -> Counts:
        return np.zeros_like(dense[:, :1]) if self.packed_rows is None else self.packed_rows

    def _count_packed(self, packed_rows: Counts) -> None:
        """Takes note of how many slots of each row and set are quantized."""
        assert self.keys is not None
        sets = self.kv_heads if self.by_head else 1
        self.packed_rows = packed_rows
        coded = np.broadcast_to(packed_rows, (len(packed_rows), sets))
        self.coded = fixed(sent(np.array(coded), self.keys.device))

    def _oldest(self, more: Counts) -> tuple[Keys, Values]:
        """Keys and values that are to be quantized: the first slots of full precision, as many as any row needs."""
        keys, values = self.dense()
        count = int(more.max())
        return keys[:, :, :count].contiguous(), values[:, :, :count].contiguous()

    def _packed_of(self, codes: Codes, more: Counts) -> Any:
        """Buffers that hold the first codes, so many of each row."""
        return Packed.of(codes).fixed()

    def _drop_first(self, more: Counts, left: Counts) -> None:
        """Gives back the first slots of full precision, each row's own number of them; so many are left in use."""
        keys, values = self.dense()
        if (more == more[0]).all():
            count = int(more[0, 0])
            self._hold(keys[:, :, count:].clone(), values[:, :, count:].clone())
        else:
            slots = torch.arange(int(left.max()), device=keys.device)
            order = slots + sent(more, keys.device).unsqueeze(-1)
            order = order.clamp(max=self.capacity - 1)
            self._hold(rows_at(keys, order), rows_at(values, order))

    def _group_of_zeros(self, heads: int) -> tuple[Codes, Codes]:
        """Codes of a group of empty slots of one row, for their shapes."""
        assert self.keys is not None and self.values is not None
        return self.coder.of_zeros((self.keys, self.values), heads)

    def _without_slots(self) -> tuple[Any, Any]:
        """Buffers for codes, with no slots yet."""
        batch = self.rows_and_heads[0]
        keys, values = (
            Packed.of(codes).each(lambda tensor: tensor.new_zeros(batch, tensor.shape[1], 0, tensor.shape[3]))
            for codes in self._group_of_zeros(self.kv_heads)
        )
        return keys, values

    def _decoded(self, start: int, end: int) -> tuple[Keys, Values]:
        """Keys and values of quantized slots; `start` begins a group."""
        assert self._packed is not None
        keys, values = self._packed
        return self.coder.decode(keys.part(start, end)), self.coder.decode(values.part(start, end))


def _as_read(codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and shifts as a kernel reads them."""
    return codes.data.view(dtype), codes.scale, codes.shift
