"""The keys and values of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.kernels import attention, attention_with_slots, decode_attention, write_slots
from kvcompress.policies.context import Keys, Queries, Values


@dataclass(frozen=True)
class InUse:
    """Which of a layer's slots that can be written to hold a token while a decode step attends.

    Attributes:
        width: slots to read; None for all that are allocated.
        bias: what is added to the logits of each slot; None while all slots read are in use, or `length` says it.
        length: slots in use, where a kernel reads these alone; None elsewhere.
        device_only: whether nothing that the host knows counts, since the step is compiled or captured.
    """

    width: int | None = None
    bias: Float[Tensor, "batch sets 1 slots"] | None = None
    length: Int[Tensor, "batch sets"] | None = None
    device_only: bool = False


class DenseStore:
    """Keys and values in the precision they came in, with room to grow.

    Slots are numbered from 0. A store of another kind may hold the first of them in another form; only those after them
    can be written to, and they alone are meant where nothing is said of packed ones. What lies beyond a row's tokens
    means nothing.

    Attributes:
        packed: slots in another form, in the row and head that has most.
        packed_rows: the same per row and set of heads, where these may differ; None if there are none.
    """

    packed = 0
    packed_rows: Counts | None = None

    def __init__(self) -> None:
        """Starts empty; the first append decides shapes, dtype and device."""
        self.keys: Keys | None = None
        self.values: Values | None = None

    @property
    def capacity(self) -> int:
        """Slots that are allocated, room for more tokens among them, in the row and head that has most."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def rows_and_heads(self) -> tuple[int, int]:
        """Rows, and key/value heads; 0 before the first token."""
        if self.keys is None or self.values is None or self.keys.shape[:3] != self.values.shape[:3]:
            return 0, 0
        return self.keys.shape[0], self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key/value heads; 0 before the first token."""
        return self.rows_and_heads[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one row's slot in full precision over all heads; 0 before the first token."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def slots_within(self, nbytes: float) -> float:
        """Slots of one row whose keys and values fit into so many bytes."""
        return nbytes / self.slot_nbytes

    def buffers(self) -> list[Tensor]:
        """Every tensor that it holds, keys and values in full precision first."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def holders(self) -> tuple[object, ...]:
        """The objects that its tensors are in: while they are the same, so are addresses and shapes."""
        return (self.keys, self.values)

    def places(self) -> list[Tensor]:
        """What says where slots are, beside keys and values."""
        return []

    def append(self, keys: Keys, values: Values, used: int) -> None:
        """Adds tokens after the first `used` slots; the first tokens' own tensors become the buffers."""
        if self.keys is None or self.values is None or not used:
            self._hold(keys.detach().contiguous(), values.detach().contiguous())
        else:
            self._hold(torch.cat([self.keys[:, :, :used], keys], 2), torch.cat([self.values[:, :, :used], values], 2))

    def write(self, key: Keys, value: Values, slot: Int[Tensor, "batch sets"]) -> None:
        """Puts one token of each row into a slot."""
        assert self.keys is not None and self.values is not None
        write_slots(self.keys, self.values, key, value, slot)

    def dense(self) -> tuple[Keys, Values]:
        """Keys and values of every slot."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def blocks(self, used: int) -> Iterator[tuple[Keys, Values]]:
        """Keys and values of the first `used` slots, in one piece."""
        yield self.padded(used)

    def padded(self, width: int) -> tuple[Keys, Values]:
        """Keys and values of so many first slots of every row and head."""
        keys, values = self.dense()
        return (keys, values) if width == keys.shape[2] else (keys[:, :, :width], values[:, :, :width])

    def _attend_in_place(self, query: Queries, scaling: float, length: Int[Tensor, "batch sets"]) -> Tensor:
        """Attention by a kernel that reads the slots in use where they are."""
        return decode_attention(query, *self.dense(), scaling, length)

    def attend(self, query: Queries, scaling: float, used: InUse) -> Tensor:
        """Attention of one query per row over the slots in use."""
        if used.length is not None:
            return self._attend_in_place(query, scaling, used.length)
        keys, values = self.padded(self.capacity if used.width is None else used.width)
        if used.bias is None and query.element_size() < 4:  # threads of a CPU share query heads better than key heads
            return attention(query, keys, values, scaling, causal=False)
        grouped = by_key_head(query, keys.shape[1])
        bias = None if used.bias is None else used.bias[..., : keys.shape[2]].expand(-1, keys.shape[1], -1, -1)
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
        return output.reshape(*query.shape[:3], -1)

    def attend_with_lse(
        self, query: Queries, scaling: float, used: InUse, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, with logits below a cap, and the log-sum-exp of each query's logits, `[batch, heads, 1]`."""
        keys, values = self.padded(self.capacity if used.width is None else used.width)
        parts = attention_with_slots(
            by_key_head(query, keys.shape[1]), keys, values, scaling, slots_in_use(used, keys.shape[2]), softcap
        )
        return of_heads(query, parts)

    def take(
        self,
        rest: Int[Tensor, "batch sets slots"],
        capacity: Counts,
        first: Int[Tensor, "batch sets packed"] | None = None,
        packed_rows: Counts | None = None,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order and gives the others back.

        Args:
            rest: slots that can be written to from now on.
            capacity: how many slots each row and set gets that can be written to, `[batch, sets]`.
            first: slots that stay packed; None if all do, where they are.
            packed_rows: how many of these mean something per row and set.
            surplus: whether some of the rest were packed before.
        """
        (keys, values), rest = self.dense(), with_slots(rest, capacity)
        self._hold(rows_at(keys, rest), rows_at(values, rest))

    def overwrite(self, keys: Keys, values: Values) -> None:
        """Replaces keys and values, `[.., packed + used, ..]`; packed slots stay what they are."""
        for buffer, new in zip(self.dense(), (keys, values), strict=True):
            buffer[:, :, : new.shape[2]] = new

    def replace(self, keys: Keys, values: Values) -> None:
        """The same in new buffers, those given, with no room for more."""
        self._hold(keys, values)

    def room(self, slots: Counts) -> Counts:
        """Slots that can be written to which are enough for so many tokens, `[batch, sets]`: as many."""
        return slots

    def has_room(self, slots: Counts, most: int | None = None) -> bool:
        """Whether rows and sets have so many slots that can be written to, `[batch, sets]`; `most` where it is known.

        Where every row and set has as many slots, the largest number decides, which asked of each layer's counts would
        be most of what the host does in a captured step.
        """
        return (int(slots.max(initial=0)) if most is None else most) <= self.capacity

    def grow(self, capacity: Counts) -> None:
        """Makes room for more slots, as many for every row and set."""
        if not self.has_room(capacity):
            keys, values = self.dense()
            most = int(capacity.max())
            self._hold(grown(keys, most), grown(values, most))

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows; in place where their number stays."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = with_rows(self.keys, index), with_rows(self.values, index)

    def to(self, device: torch.device) -> None:
        """Moves every buffer to a device, without waiting for the copy."""
        if self.keys is not None and self.values is not None:
            self._hold(*(buffer.to(device, non_blocking=True) for buffer in self.dense()))

    def saved(self, used: int) -> dict[str, Any]:
        """What has to be kept of the first `used` slots, and of packed ones, to go on elsewhere."""
        keys, values = self.dense()
        return {"keys": keys[:, :, :used], "values": values[:, :, :used], "capacity": self.capacity}

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        self._hold(grown(saved["keys"], saved["capacity"]), grown(saved["values"], saved["capacity"]))

    def make_room(self, dense: Counts, later: Counts | None = None) -> None:
        """Makes room for what will be packed of so many tokens, or of `later` ones; nothing is, here."""

    def move_into(self, before: DenseStore) -> None:
        """Puts what it holds into the buffers that it had before, where compiled steps look for it."""
        for buffer, now in zip(before.dense(), self.dense(), strict=True):
            buffer[:, :, : now.shape[2]] = now
        self.keys, self.values = before.keys, before.values

    def back_into(self, before: DenseStore) -> None:
        """Puts what it holds into the buffers that it had before, if it fits."""
        if self.capacity <= before.capacity:
            self.move_into(before)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = fixed(keys), fixed(values)


def fixed(buffer: Tensor) -> Tensor:
    """The same buffer, of which compiled decode steps know that it stays where it is."""
    if not (buffer.is_inference() or torch.compiler.is_compiling()):
        torch._dynamo.mark_static_address(buffer)
    return buffer


def with_rows(buffer: Tensor, index: Int[Tensor, " rows"]) -> Tensor:
    """A buffer with other rows of its own, in place where their number stays, so that compiled steps find them."""
    picked = buffer.index_select(0, index.to(buffer.device))
    return buffer.copy_(picked) if len(picked) == len(buffer) else fixed(picked)


def rows_at(tensor: Tensor, order: Int[Tensor, "batch sets slots"]) -> Tensor:
    """Slots of every row and head in the given order, copied."""
    heads, width = tensor.shape[1], tensor.shape[3]
    return tensor.gather(2, order.unsqueeze(-1).expand(-1, heads, -1, width))


def slots_in_use(used: InUse, slots: int) -> Tensor | None:
    """Which of the first slots of full precision are in use, `[batch, sets, slots]`; None if all are."""
    if used.bias is not None:
        return used.bias[..., 0, :slots] == 0
    if used.length is None:
        return None
    return torch.arange(slots, device=used.length.device) < used.length.unsqueeze(-1)


def of_heads(query: Queries, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries that `by_key_head` put together, head by head."""
    output, lse = parts
    return output.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def with_slots(order: Int[Tensor, "batch sets slots"], capacity: Counts) -> Int[Tensor, "batch sets more"]:
    """Slots in the given order, and any slot after them as far as the row and set goes that gets most."""
    more = int(capacity.max(initial=0)) - order.shape[2]
    return F.pad(order, (0, more)) if more > 0 else order


def by_key_head(query: Queries, kv_heads: int) -> Tensor:
    """One query per row as as many queries of each key/value head as there are heads in its group."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[3])


def grown(tensor: Tensor, capacity: int) -> Tensor:
    """A copy with room for so many slots, zero in those that are new; as usable outside of inference mode as before."""
    batch, heads, slots, width = tensor.shape
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        larger = tensor.new_zeros(batch, heads, capacity, width)
        larger[:, :, :slots] = tensor
    return larger
