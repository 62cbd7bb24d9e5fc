"""What a layer holds, and in which order it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.positions import taken
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.cache.ragged_quantized_store import RaggedQuantizedStore
from kvcompress.cache.ragged_store import RaggedStore
from kvcompress.cache.ranking import importance_of
from kvcompress.cache.recent import Recent
from kvcompress.cache.selection import order_of
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.kernels import sent
from kvcompress.parallel import ALONE, HeadGroup

_SAVED = ("index", "held", "slots", "scores", "statistics", "pinned", "merger_state", "heads_part", "uneven", "recent")


class HeldTokens:
    """Keys and values of one decoder layer, and what belongs to their slots.

    Between steps the tokens lie in the store: packed ones first, then `slots` others, in the order of their age. While
    the model decodes, the cache's slot table says where they lie.

    Attributes:
        number: index of the decoder layer.
        config: the policies and the budget.
        heads: the processes that share the layer's heads.
        sequence: what was seen.
        store: keys and values.
        device: where they are; None before the first token.
        index: number of tokens of the row before each slot's token, `[batch, sets, packed + slots]`; -1 where a row has
            none. What the table says goes before.
        held: tokens that the layer holds, `[batch, sets]`; one set where all heads hold as many.
        slots: slots in use that are not packed, in the row and head that has most.
        scores: scores of the slots, `[batch, kv_heads, packed + slots]`; None before any were set. Those of tokens that
            came after the last step that scored mean nothing.
        statistics: what the allocator reads of the last step that scored, by name, `[batch]`.
        pinned: oldest tokens that decode steps never evict by age, `[batch, sets]`.
        merger_state: what the merger remembers, batch first.
        heads_part: whether the heads of the layer, in any process, hold different tokens.
        uneven: whether they hold different numbers of them.
        recent: the last queries, for evictors that score between prompts; None for others.
    """

    def __init__(self, number: int, config: CompressionConfig, sequence: Sequence, heads: HeadGroup = ALONE) -> None:
        """Starts with nothing held."""
        self.number, self.config, self.heads = number, config, heads
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Starts anew, with what is seen from now on in `sequence`."""
        self.sequence = sequence
        self.store = self._new_store()
        self.index: Tensor | None = None
        self.held: Counts = np.zeros((0, 1), dtype=np.int64)
        self.slots = 0
        self.scores: Tensor | None = None
        self.statistics: dict[str, Tensor] = {}
        self.pinned: Counts = np.zeros((0, 1), dtype=np.int64)
        self.merger_state: Tensor | None = None
        self.heads_part = self.uneven = False
        self.device: torch.device | None = None
        self.recent: Recent | None = None

    def _new_store(self) -> DenseStore:
        """An empty store, of the kind that the policies ask for."""
        by_head = self.config.evictor is not None and self.config.allocator.by_head
        if self.config.quantizer is not None:
            kind = RaggedQuantizedStore if by_head else QuantizedStore
            return kind(self.config.quantizer, self.number)
        return RaggedStore() if by_head else DenseStore()

    def every_slot(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots in use; a copy in full precision where some are packed."""
        blocks = list(self.store.blocks(self.slots))
        if len(blocks) == 1:
            return blocks[0]
        keys, values = zip(*blocks, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def close_ranks(self, room: Counts | int) -> None:
        """Brings the tokens of rows with padding between them together, in the first slots."""
        assert self.index is not None
        if (self.held != self.index.shape[2]).any():
            self._take(self.index >= 0, self.held, room)

    def tidy(self, table: SlotTable) -> None:
        """Brings the tokens in the order of their age again after decode steps, and takes note of what is held."""
        extent, hole, packed = table.extent[self.number], table.hole[self.number], self.store.packed
        width, rows = int(extent.max()), extent - hole
        assert self.index is not None
        slots = torch.arange(width, device=table.index.device)
        freed = slots == table.free[self.number].unsqueeze(-1)
        index = table.index[self.number, :, :, :width].masked_fill(freed, -1).to(self.index.device)
        order = order_of(index >= 0, index, int(rows.max()), ordered=False)
        self.heads_part = self.heads_part or table.sets > 1
        before = self.index[..., :packed].expand(-1, index.shape[1], -1)
        self.index, self.slots = torch.cat([before, index], 2), width
        self._keep(None, self.packed_rows, order + packed, rows, room=0)

    def drop_from(self, first: Counts) -> None:
        """Drops the tokens of each row from a token index on."""
        if self.index is None:
            return
        limit = sent(first, self.index.device, self.index.dtype)[:, None, None]
        mask = (self.index >= 0) & (self.index < limit)
        left = mask[:, : self.held.shape[1]].sum(-1).cpu().numpy()
        if (left != self.held).any():
            self._take(mask, left, room=0)

    def renumber(self, new_index: Tensor) -> None:
        """Gives tokens new indices, and drops those that have none any more."""
        if self.index is None:
            return
        self.index = taken(new_index.to(self.index.device), self.index, fill=-1).to(self.index.dtype)
        counts = (self.index >= 0).sum(-1)
        everywhere = (self.heads.gather(counts) if self.heads_part else counts).cpu().numpy()
        left = everywhere[:, :1]
        if self.uneven or (everywhere != left).any():
            self.uneven = True
            left = everywhere[:, self.heads.part(everywhere.shape[1])]
        if left.shape != self.held.shape or (left != self.held).any():
            self._take(self.index >= 0, left, room=0)

    def pack(self) -> None:
        """Quantizes what is old enough, while tokens lie in the order of their age."""
        if not isinstance(self.store, QuantizedStore) or self.index is None:
            return
        before, packed, dense = self.packed_rows, self.store.packed, self.held - self.packed_rows
        more = self.store.pack(dense)
        if not more.any():
            return
        after, left = before + more, dense - more
        stay, width, device = self.store.packed, int(left.max()), self.index.device
        begin, moved = (sent(counts, device).unsqueeze(-1) for counts in (before, more))
        place = torch.arange(stay, device=device)
        first = torch.where(place < begin, place, packed + place - begin)
        rest = packed + moved + torch.arange(width, device=device)
        first = first.expand(-1, rest.shape[1], -1)
        arrangement = torch.cat([first, rest], 2).clamp(max=self.index.shape[2] - 1)
        self._arrange(arrangement, after, left)

    @property
    def packed_rows(self) -> Counts:
        """Tokens of each row that are packed, `[batch, sets]`; one set where all heads have as many."""
        return np.zeros_like(self.held[:, :1]) if self.store.packed_rows is None else self.store.packed_rows

    @property
    def by_head(self) -> bool:
        """Whether every head has its own number of packed tokens."""
        return isinstance(self.store, QuantizedStore) and self.store.by_head

    def _take(self, mask: Tensor, counts: Counts, room: Counts | int) -> None:
        """Keeps the marked slots, as many of each row and set as are counted, in the order of their tokens."""
        assert self.index is not None
        self.take(mask, order_of(mask, self.index, int(counts.max(initial=0)), ordered=True), counts, room)

    def take(self, mask: Tensor, order: Tensor, counts: Counts, room: Counts | int) -> None:
        """Keeps slots and gives the others back.

        Args:
            mask: slots that stay, `[batch, sets, slots]`.
            order: the same slots in the order of their tokens; any after them.
            counts: how many stay in each row and set, `[batch, sets]`, or in every set of a row, `[batch, 1]`.
            room: slots to allocate beyond them.
        """
        packed = self.store.packed
        if not packed:
            self._keep(None, self.packed_rows, order, counts, room)
            return
        quantized = mask[..., :packed].sum(-1)
        if self.by_head:
            least, surplus = quantized.cpu().numpy(), False
        else:
            quantized = self.heads.gather(quantized) if self.heads_part else quantized
            least, largest = torch.stack([quantized.amin(1), quantized.amax(1)]).unsqueeze(-1).cpu().numpy()
            surplus = bool((least != largest).any())
        dense = counts - least
        begin = sent(least, order.device).unsqueeze(-1)
        place = torch.arange(int(dense.max(initial=0)), device=order.device)
        rest = order.gather(-1, (begin + place).clamp(max=max(0, order.shape[2] - 1)).expand(-1, order.shape[1], -1))
        same = not surplus and (least == self.packed_rows).all()
        first = None if same else order[..., : int(least.max())].clamp(max=packed - 1)  # beyond a row's own: anything
        self._keep(first, least, rest, dense, room, surplus)

    def _keep(
        self,
        first: Tensor | None,
        packed_rows: Counts,
        rest: Tensor,
        rows: Counts,
        room: Counts | int,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order.

        Args:
            first: slots that stay packed, `[batch, sets, slots]`; None if all do, where they are.
            packed_rows: how many of them each row and set has.
            rest: the other slots; any after them.
            rows: how many of them each row and set has.
            room: slots to allocate beyond them.
            surplus: whether some of the others were packed before.
        """
        packed = self.store.packed
        self.store.take(rest, rows + room, first, packed_rows, surplus)
        rest = rest[..., : int(rows.max(initial=0))]
        if first is None and packed:
            first = torch.arange(packed, device=rest.device).expand(*rest.shape[:2], -1)
        self._arrange(rest if first is None else torch.cat([first, rest], 2), packed_rows, rows)

    def _arrange(self, arrangement: Tensor, packed_rows: Counts, rows: Counts) -> None:
        """Brings what belongs to slots into a new order; of both parts only the first so many mean something."""
        assert self.index is not None
        width, before = int(rows.max(initial=0)), self.index.shape[2]
        stay = arrangement.shape[2] - width
        sets = max(arrangement.shape[1], self.index.shape[1])
        self.index = self.index.expand(-1, sets, -1).gather(-1, arrangement.expand(-1, sets, -1))
        if (packed_rows != stay).any() or (rows != width).any():
            place = torch.arange(stay + width, device=self.index.device)
            ends = [sent(n, place.device)[..., None] for n in (packed_rows, stay + rows)]
            self.index = self.index.masked_fill(torch.where(place < stay, place >= ends[0], place >= ends[1]), -1)
        if self.scores is not None:
            more = before - self.scores.shape[2]  # tokens that came since have none
            scores = F.pad(self.scores, (0, more)) if more else self.scores
            self.scores = scores.gather(-1, arrangement.expand(-1, scores.shape[1], -1))
        self.slots, self.held = width, packed_rows + rows

    def ranks(self) -> Tensor | None:
        """Importance of the slots that can be written to, NaN where a token has no score; None without scores."""
        scorer = self.config.scorer
        if scorer is None or self.scores is None or self.index is None:
            return None
        ranks = importance_of(scorer, self.scores, self.index, self.sequence, self.number)
        return ranks[..., self.store.packed :]

    def select_rows(self, index: Tensor, rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        if self.index is None:
            return
        packed, width = self.store.packed, self.index.shape[2]
        self.store.select_rows(index, rows)
        self.held, self.pinned = self.held[rows], self.pinned[rows] if len(self.pinned) else self.pinned
        for name in ("index", "scores", "merger_state"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        self._drop_columns(packed, width)
        if self.recent is not None:
            self.recent.select_rows(index)
        for name, known in self.statistics.items():
            self.statistics[name] = known.index_select(0, index.to(known.device))

    def _drop_columns(self, packed: int, width: int) -> None:
        """Leaves out of `width` columns, `packed` of them packed, those that only rows had which are gone."""
        assert self.index is not None
        now, slots = self.store.packed, min(width - packed, self.store.capacity)
        self.slots = min(self.slots, self.store.capacity)
        if now + slots == width:
            return
        stay = torch.cat([torch.arange(now), torch.arange(packed, packed + slots)])
        self.index = self.index.index_select(2, sent(stay, self.index.device))
        if self.scores is not None:
            scores = F.pad(self.scores, (0, width - self.scores.shape[2]))  # tokens that came since have none
            self.scores = scores.index_select(2, sent(stay, scores.device))

    def saved(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere."""
        return {**{name: getattr(self, name) for name in _SAVED}, "store": self.store.saved(self.slots)}

    def restore(self, saved: Any, device: torch.device) -> None:
        """Takes over what `saved` gave, which lies on that device."""
        for name in _SAVED:
            setattr(self, name, {"recent": None, **saved}[name])  # older releases remembered no queries
        self.device = device
        self.store.restore(saved["store"])

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the layer that this process holds; 0 before the first token."""
        return self.store.kv_heads

    def index_tensors(self) -> list[Tensor]:
        """What belongs to slots beside keys and values; layers may share some of it."""
        recent = [] if self.recent is None else self.recent.tensors()
        tensors = (self.index, self.scores, self.merger_state, *self.store.places(), *recent)
        return [tensor for tensor in tensors if tensor is not None]
