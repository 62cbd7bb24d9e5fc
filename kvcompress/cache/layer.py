"""One decoder layer of a compressed cache: what it holds, and the flow of data through a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.cache.allocation import Allocation, protection
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.cache.selection import (
    Ranked,
    checked_selection,
    importance_of,
    merged,
    order_of,
    selection_message,
    without_unknown,
)
from kvcompress.cache.sequence import Counts, Sequence, taken, with_last, without_last
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import Phase, Step
from kvcompress.cache.store import DenseStore, fix_address
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, PolicyError
from kvcompress.kernels import attend_blocks, attention_with_lse, attention_with_mask, merge_attention
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.context import DecodeContext, LayerContext, LayerWeights, MergeContext, SelectionContext
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.statistics import STATISTICS

_SAVED = ("index", "held", "slots", "scores", "ranks", "statistics", "pinned", "merger_state", "heads_part")


@dataclass(frozen=True)
class Unscored:
    """A step that may be undone, which scores once it is known what stays of it.

    Attributes:
        query: queries of its tokens.
        lse: log-sum-exp of their logits; None if nobody reads attention.
        scaling: factor on the logits.
        weights: gives the layer's own weights.
    """

    query: Tensor
    lse: Tensor | None
    scaling: float
    weights: Callable[[], LayerWeights]


class CompressedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One decoder layer of a `CompressedCache`: its store, its scores, and what becomes of them in a step.

    Between steps the tokens lie in the store: packed ones first, then `slots` others, in the order of their age. While
    the model decodes, the cache's slot table says where they lie.

    Attributes:
        number: index of the decoder layer.
        store: keys and values.
        index: number of tokens of the row before each slot's token, `[batch, sets, packed + slots]`; -1 where a row has
            none. What the table says goes before.
        held: tokens that the layer holds per row.
        slots: slots in use that are not packed, in the row that has most.
        scores: scores of the slots, `[batch, kv_heads, packed + slots]`; None before any were set. Those of tokens that
            came after the last step that scored mean nothing.
        statistics: what the allocator reads of the last step that scored, by name, `[batch]`.
        pinned: oldest tokens per row that decode steps never evict by age.
        merger_state: what the merger remembers, batch first.
        unscored: the last step, while it may be undone.
        heads_part: whether the heads of the layer, in any process, hold different tokens.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, number: int, config: CompressionConfig, sequence: Sequence, heads: HeadGroup = ALONE) -> None:
        """Starts with nothing held."""
        self.number, self.config, self.heads = number, config, heads
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Starts anew, with what is seen from now on in `sequence`."""
        quantizer = self.config.quantizer
        self.sequence = sequence
        self.store: DenseStore = DenseStore() if quantizer is None else QuantizedStore(quantizer, self.number)
        self.index: Tensor | None = None
        self.held: Counts = np.zeros(0, dtype=np.int64)
        self.slots = 0
        self.scores: Tensor | None = None
        self.ranks: Tensor | None = None
        self.statistics: dict[str, Tensor] = {}
        self.pinned: Counts = np.zeros(0, dtype=np.int64)
        self.merger_state: Tensor | None = None
        self.unscored: Unscored | None = None
        self.heads_part = False
        self.device: torch.device | None = None

    # -- a step --------------------------------------------------------------------------------------------------------

    def attend(
        self,
        step: Step,
        table: SlotTable | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        weights: Callable[[], LayerWeights] = LayerWeights,
    ) -> Tensor:
        """Stores this step's tokens, attends over all, scores, and gives up what is over the budget.

        Args:
            step: the forward in progress.
            table: where tokens lie, in a decode step.
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, kv_heads, queries, head_dim]`.
            value: like `key`.
            scaling: factor on the logits.
            weights: gives the layer's own weights, for scorers that read them.

        Returns:
            The attention output, `[batch, heads, queries, head_dim]`.
        """
        if step.phase is Phase.DECODE:
            assert table is not None
            self.store.write(key, value, table.write[self.number])
            output = self._attend_one(step, table, query, scaling)
            self.free(step, table)
            return output
        query, key, value = (step.aligned(tensor) for tensor in (query, key, value))
        past = self._append(step, key, value)
        valid = self._valid(step)
        output, lse = attend_blocks(query, self.store.blocks(self.slots), past, scaling, valid, self._reads_attention)
        if step.evicts:
            self._score(step, Unscored(query, lse, scaling, weights))
        elif self.config.scorer is not None or self._needs:
            self.unscored = Unscored(query, lse, scaling, weights)
        if step.local is not None:  # sizes are known before the last layer ran
            self.compress(step, step.local())
        return step.restored(output)

    def compress(self, step: Step, allocation: Allocation, ranked: Ranked | None = None) -> None:
        """Selects the slots that stay, merges the others into them, and gives those back."""
        budget, evictor = allocation.budgets[self.number], self.config.evictor
        assert self.index is not None and evictor is not None
        if (budget != self.held).any():
            index, importance = ranked or self.ranked()
            images = allocation.image_budgets
            context = SelectionContext(
                budget=torch.as_tensor(budget, device=index.device),
                valid=index >= 0,
                protected=step.once("protected", index, lambda: self._protected(index)),
                index=index,
                importance=importance,
                is_image=step.once("images", index, lambda: self.sequence.images_at(index)),
                image_budget=None if images is None else images[self.number].to(index.device),
                problems=step.problems,
            )
            mask, wrong = checked_selection(evictor, self.number, context)
            step.problems.note(lambda: selection_message(evictor, self.number, mask, context), wrong)
            self.heads_part = self.heads_part or mask.shape[1] > 1
            own = self.heads.own(mask)
            if self.config.merger is not None:
                most = int(budget.max()), int((self.held - budget).max())
                own_importance = None if importance is None else self.heads.own(importance)
                self._merge(own, (self.index >= 0) & ~own, own_importance, most, decoding=False)
            self._take(own, budget, step.room[self.number])
        else:
            self.close_ranks(step.room[self.number])
        self._pin()
        self.pack()

    # -- prefill -------------------------------------------------------------------------------------------------------

    @property
    def _reads_attention(self) -> bool:
        scorer = self.config.scorer
        return bool(self._needs) or (scorer is not None and scorer.reads_attention)

    @property
    def _needs(self) -> tuple[str, ...]:
        return self.config.allocator.needs if self.config.evictor is not None else ()

    def _append(self, step: Step, key: Tensor, value: Tensor) -> int:
        """Stores the tokens of a step after the others; returns the slots before them."""
        assert step.index is not None
        past = self.store.packed + self.slots
        self.store.append(key, value, self.slots)
        if self.index is None:
            self.index, self.device, self.held = step.index, key.device, np.zeros(len(step.row_new), dtype=np.int64)
        else:
            new = step.index.to(self.index.device).expand(-1, self.index.shape[1], -1)
            self.index = torch.cat([self.index[..., :past], new], 2)
        self.slots += key.shape[2]
        self.held = self.held + step.row_new
        return past

    def _valid(self, step: Step) -> Tensor | None:
        """Which slots hold a token, `[batch, 1, slots]`; None if all do."""
        assert self.index is not None
        if (self.held == self.index.shape[2]).all():
            return None
        index = self.index[:, :1]
        valid: Tensor = step.once("valid", index if self.index.shape[1] > 1 else self.index, lambda: index >= 0)
        return valid

    def settle(self, step: Step, gone: Counts) -> None:
        """Scores what was left unscored, by the queries of each row but its last so many."""
        unscored, self.unscored = self.unscored, None
        if unscored is not None and gone.min(initial=0) < unscored.query.shape[2]:
            self._score(step, unscored, gone)

    def _score(self, step: Step, of: Unscored, gone: Counts | None = None) -> None:
        """Scores every slot by what a step shows, and takes the statistics that the allocator reads.

        Args:
            step: the step in progress.
            of: queries of the step that is to score.
            gone: last tokens of each row in that step, which are about to be taken back.
        """
        scorer, needs, index = self.config.scorer, self._needs, self.index
        observed = step.reduction is not None and step.reduction.observes(self.number)
        if scorer is None and not needs and not observed:
            return
        assert index is not None
        keys, values = self.every_slot()
        query, lse, valid = of.query, of.lse, self._valid(step)
        if gone is not None and gone.any():
            keys, values, query, index = (without_last(tensor, gone) for tensor in (keys, values, query, index))
            lse = None if lse is None else without_last(lse, gone)
            more = torch.as_tensor(gone - gone.min(), device=index.device)[:, None, None]
            index = index.masked_fill(torch.arange(index.shape[2], device=index.device) < more, -1)
            valid = index[:, :1] >= 0
        context = LayerContext(
            layer=self.number,
            query=query,
            keys=keys,
            values=values,
            lse=lse if self._reads_attention else None,
            scaling=of.scaling,
            index=index,
            seen=step.seen_on(query.device),
            valid=valid,
            is_image=step.once("images", index, lambda: self.sequence.images_at(index)),
            weights=of.weights() if scorer is not None else LayerWeights(),
            heads=self.heads,
        )
        if observed:
            assert step.reduction is not None
            step.reduction.observe(replace(context, lse=None))
        for name in needs:
            with policy_errors(self.config.allocator, self.number):
                self.statistics[name] = self.heads.mean(STATISTICS[name](context))
        if scorer is None:
            return
        with policy_errors(scorer, self.number):
            scores = scorer.score(context)
            shape = tuple(scores.shape)
        expected = tuple(keys.shape[:3])
        label = f"scorer {scorer.name}: layer {self.number}: must return finite scores of the shape {expected}"
        if shape != expected:
            raise PolicyError(f"{label} [batch, kv_heads, tokens]; got the shape {shape}")
        step.problems.note(f"{label} [batch, kv_heads, tokens]; got NaN or infinite scores", ~scores.isfinite().all())
        scores = scores.to(torch.float32)
        if gone is not None and gone.any():
            scores, index = with_last(scores, gone), self.index
        if scorer.accumulates and self.scores is not None:
            known, unscored = self.scores, self.sequence.unscored_before(index[..., : self.scores.shape[2]])
            known = known if unscored is None else known.masked_fill(unscored, 0.0)
            scores = scores + F.pad(known, (0, scores.shape[2] - known.shape[2]))
        self.scores = scores

    def every_slot(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots in use; a copy in full precision where some are packed."""
        blocks = list(self.store.blocks(self.slots))
        if len(blocks) == 1:
            return blocks[0]
        keys, values = zip(*blocks, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    # -- what is held, in order ----------------------------------------------------------------------------------------

    def ranked(self) -> Ranked:
        """Token index and importance of the slots over all heads of the layer, those of other processes included."""
        assert self.index is not None
        index = self.heads.gather(self.index) if self.heads_part else self.index
        if self.config.scorer is None or self.scores is None:
            return index, None
        importance = importance_of(self.config.scorer, self.scores, self.index, self.sequence, self.number)
        if (self.sequence.scored.end < self.sequence.row_seen).any():
            importance = without_unknown(importance)
        return index, self.heads.gather(importance)

    def _protected(self, index: Tensor) -> Tensor:
        return self.sequence.protected(index, *protection(self.config))

    def close_ranks(self, room: int) -> None:
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
        limit = torch.as_tensor(first, dtype=self.index.dtype, device=self.index.device)[:, None, None]
        mask = (self.index >= 0) & (self.index < limit)
        left = mask[:, 0].sum(-1).cpu().numpy()
        if (left != self.held).any():
            self._take(mask, left, room=0)

    def renumber(self, new_index: Tensor) -> None:
        """Gives tokens new indices, and drops those that have none any more."""
        if self.index is None:
            return
        self.index = taken(new_index.to(self.index.device), self.index, fill=-1).to(self.index.dtype)
        counts = (self.index >= 0).sum(-1)
        counts = self.heads.gather(counts) if self.heads_part else counts
        least, most = torch.stack([counts.amin(1), counts.amax(1)]).cpu().numpy()
        if (least != most).any():  # heads that hold more than others give up their oldest tokens
            latest = (self.index >= 0).cumsum(-1)
            limit = torch.as_tensor(least, device=self.index.device)[:, None, None]
            kept = (self.index >= 0) & (latest > latest[..., -1:] - limit)
            self._take(kept, least, room=0)
        elif (least != self.held).any():
            self._take(self.index >= 0, least, room=0)

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
        begin, moved = (torch.as_tensor(counts, device=device)[:, None, None] for counts in (before, more))
        place = torch.arange(stay, device=device)
        first = torch.where(place < begin, place, packed + place - begin)
        rest = packed + moved + torch.arange(width, device=device)
        arrangement = torch.cat([first, rest], 2).clamp(max=self.index.shape[2] - 1)
        self._arrange(arrangement, after, left)

    @property
    def packed_rows(self) -> Counts:
        """Tokens of each row that are packed."""
        return np.zeros_like(self.held) if self.store.packed_rows is None else self.store.packed_rows

    def _take(self, mask: Tensor, counts: Counts, room: int) -> None:
        """Keeps the marked slots, `counts[row]` in every set of a row, in the order of their tokens."""
        assert self.index is not None
        order, packed = order_of(mask, self.index, int(counts.max(initial=0)), ordered=True), self.store.packed
        if not packed:
            self._keep(None, self.packed_rows, order, counts, room)
            return
        quantized = mask[..., :packed].sum(-1)
        quantized = self.heads.gather(quantized) if self.heads_part else quantized
        least, largest = torch.stack([quantized.amin(1), quantized.amax(1)]).cpu().numpy()
        dense, surplus = counts - least, bool((least != largest).any())
        begin = torch.as_tensor(least, device=order.device)[:, None, None]
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
        room: int,
        surplus: bool = False,
    ) -> None:
        """Keeps slots in a new order.

        Args:
            first: slots that stay packed, `[batch, sets, slots]`; None if all do, where they are.
            packed_rows: how many of them each row has.
            rest: the other slots.
            rows: how many of them each row has.
            room: slots to allocate beyond them.
            surplus: whether some of the others were packed before.
        """
        packed = self.store.packed
        self.store.take(F.pad(rest, (0, room)) if room else rest, first, packed_rows, surplus)
        if first is None:
            first = torch.arange(packed, device=rest.device).expand(*rest.shape[:2], -1)
        self._arrange(torch.cat([first, rest], 2) if first.shape[2] else rest, packed_rows, rows)

    def _arrange(self, arrangement: Tensor, packed_rows: Counts, rows: Counts) -> None:
        """Brings what belongs to slots into a new order; in each part, a row's first so many mean something."""
        assert self.index is not None
        width, before = int(rows.max(initial=0)), self.index.shape[2]
        stay = arrangement.shape[2] - width
        sets = max(arrangement.shape[1], self.index.shape[1])
        self.index = self.index.expand(-1, sets, -1).gather(-1, arrangement.expand(-1, sets, -1))
        if (packed_rows != stay).any() or (rows != width).any():
            place = torch.arange(stay + width, device=self.index.device)
            counts = [torch.as_tensor(n, device=place.device)[:, None, None] for n in (packed_rows, stay + rows)]
            self.index = self.index.masked_fill(torch.where(place < stay, place >= counts[0], place >= counts[1]), -1)
        if self.scores is not None:
            scores = F.pad(self.scores, (0, before - self.scores.shape[2]))  # tokens that came since have none
            self.scores = scores.gather(-1, arrangement.expand(-1, scores.shape[1], -1))
        self.slots, self.held = width, packed_rows + rows

    def _pin(self) -> None:
        """Decides which tokens decode steps never evict by age: sinks, those to come too, and what an evictor pins."""
        evictor = self.config.evictor
        if evictor is not None and evictor.frees == "oldest":
            sinks, recents = protection(self.config)
            first = self.sequence.first_given(self.number, sinks)
            kept, given = torch.as_tensor(self.held), torch.as_tensor(first)
            with policy_errors(evictor, self.number):
                pinned = np.maximum(evictor.pinned(kept, given, recents).numpy(), first)
            self.pinned = pinned + np.maximum(0, sinks - self.sequence.row_seen)

    def _merge(
        self,
        kept: Tensor,
        evicted: Tensor,
        importance: Tensor | None,
        most: tuple[int, int],
        decoding: bool,
        in_place: bool = False,
    ) -> None:
        """Lets the kept slots take up those that go, whose keys and values are still there."""
        merger, index = self.config.merger, self.index
        assert merger is not None and index is not None
        keys, values = self.every_slot()
        every_head = (keys.shape[0], keys.shape[1], -1)
        images, kept = self.sequence.images_at(index), kept.expand(every_head)
        if self.store.packed:  # what is quantized takes up nothing any more
            kept = kept.clone()
            kept[..., : self.store.packed] = False
        context = MergeContext(
            layer=self.number,
            keys=keys,
            values=values,
            kept=kept,
            evicted=evicted.expand(every_head),
            index=index.long().expand(every_head),
            importance=importance,
            is_image=None if images is None else images.expand(every_head),
            most_kept=most[0],
            most_evicted=most[1],
            decoding=decoding,
            state=self.merger_state,
            first_head=self.heads.first(keys.shape[1]),
        )
        result = merged(merger, self.number, context)
        if in_place:
            self.store.overwrite(result.keys, result.values)
        else:
            self.store.replace(result.keys, result.values)
        self.merger_state = result.state

    def rank_slots(self, slots: int) -> None:
        """Takes down the importance of each slot, for an evictor that chooses while decoding."""
        scorer, self.ranks = self.config.scorer, None
        if scorer is not None and self.scores is not None and self.index is not None:
            ranks = importance_of(scorer, self.scores, self.index, self.sequence, self.number)
            self.ranks = F.pad(ranks, (0, slots - ranks.shape[2]), value=torch.nan)
            fix_address(self.ranks)

    def rank_more(self, slots: int) -> None:
        """Makes room for slots whose tokens have no score yet."""
        if self.ranks is not None:
            self.ranks = F.pad(self.ranks, (0, slots - self.ranks.shape[2]), value=torch.nan)
            fix_address(self.ranks)

    def select_rows(self, index: Tensor, rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        if self.index is None:
            return
        self.store.select_rows(index, rows)
        self.held, self.pinned = self.held[rows], self.pinned[rows] if len(self.pinned) else self.pinned
        for name in ("index", "scores", "ranks", "merger_state"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        for name, known in self.statistics.items():
            self.statistics[name] = known.index_select(0, index.to(known.device))

    def state(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere."""
        return {**{name: getattr(self, name) for name in _SAVED}, "store": self.store.state(self.slots)}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes over what `state` gave, which lies on that device."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self.device = device
        self.store.restore(state["store"])
        if self.ranks is not None:
            fix_address(self.ranks)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the layer that this process holds; 0 before the first token."""
        return 0 if self.store.keys is None else self.store.keys.shape[1]

    def index_tensors(self) -> list[Tensor]:
        """What belongs to slots beside keys and values; layers may share some of it."""
        tensors = (self.index, self.scores, self.ranks, self.merger_state)
        return [tensor for tensor in tensors if tensor is not None]

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _attend_one(self, step: Step, table: SlotTable, query: Tensor, scaling: float) -> Tensor:
        """Attention of one query per row over every slot in use."""
        batch, heads, _, head_dim = query.shape
        keys, values = self.store.dense()
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        if step.widths is not None:
            width = step.widths[self.number]
            keys, values = keys[:, :, :width], values[:, :, :width]
        bias = None if step.bias is None else step.bias[self.number, ..., : keys.shape[2]].to(query.device)
        if not self.store.packed:
            output = F.scaled_dot_product_attention(
                grouped,
                keys,
                values,
                attn_mask=None if bias is None else bias.expand(-1, keys.shape[1], -1, -1),
                scale=scaling,
            )
        else:
            output = self._attend_packed(grouped, keys, values, None if bias is None else bias[:, 0, 0] == 0, scaling)
        return output.reshape(batch, heads, 1, values.shape[3])

    def _attend_packed(
        self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor | None, scaling: float
    ) -> Tensor:
        """The same where some slots are packed, which are decoded a block at a time."""
        packed_rows, parts, first = self.packed_rows, None, 0
        *blocks, _ = self.store.blocks(self.store.capacity)
        for block in (*blocks, (keys, values)):
            end = first + block[0].shape[2]
            valid = used if end > self.store.packed else None
            if end <= self.store.packed and (packed_rows < end).any():
                place = torch.arange(first, end, device=query.device)
                valid = place < torch.as_tensor(packed_rows, device=query.device)[:, None]
            if valid is None:
                part = attention_with_lse(query, *block, scaling, causal=False)
            else:
                part = attention_with_mask(query, *block, scaling, valid, causal=False)
            parts, first = part if parts is None else merge_attention(*parts, *part), end
        assert parts is not None
        return parts[0]

    def free(self, step: Step, table: SlotTable) -> None:
        """Frees the slot that the evictor names where the layer is over its limit; merges what goes, if asked for."""
        evictor, number = self.config.evictor, self.number
        if step.over is not None and evictor is not None:
            index = table.index[number]
            importance = None if self.ranks is None else torch.where(index < table.scored_end, self.ranks, torch.nan)
            of_all = self.heads.gather(index) if table.sets > 1 else index
            every = None if importance is None else self.heads.gather(importance)
            with policy_errors(evictor, number):
                victims = evictor.victim(DecodeContext(of_all, table.protected(of_all), every))
                sets = victims.shape[1]
            self.heads_part = self.heads_part or sets > 1
            victims = self.heads.own(victims)
            if victims.shape[1] > table.sets:
                raise PolicyError(
                    f"evictor {evictor.name}: layer {number}: named a slot for each head, but its by_head says that "
                    "heads hold the same tokens; let by_head be True"
                )
            table.choose(number, step.over[number], victims)
        merger = self.config.merger
        if step.merges and merger is not None:
            self.merge_freed(table, in_place=True)

    def merge_freed(self, table: SlotTable, in_place: bool) -> None:
        """Merges what a decode step freed into the slots that stay."""
        number, width, packed = self.number, int(table.extent[self.number].max()), self.store.packed
        if not table.hole[number].any():
            return
        own, index = self.index, table.index[number, :, :, :width]
        assert own is not None
        freed = torch.arange(width, device=index.device) == table.free[number].unsqueeze(-1)
        self.index, self.slots = torch.cat([own[..., :packed].expand(-1, index.shape[1], -1), index], 2), width
        freed = F.pad(freed, (packed, 0)) & (self.index >= 0)
        importance, slots = self.scores, packed + width
        if self.config.scorer is not None and importance is not None:
            padded = F.pad(importance, (0, max(0, slots - importance.shape[2])))[..., :slots]
            importance = importance_of(self.config.scorer, padded, self.index, self.sequence, number)
        kept = (self.index >= 0) & ~freed
        self._merge(kept, freed, importance, (slots, 1), decoding=True, in_place=in_place)
        self.index = own

    # -- transformers' contract ----------------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds anything."""
        return self.index is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the slots in use, `[batch, kv_heads, slots, head_dim]`."""
        return self.every_slot()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots in use."""
        return self.every_slot()[1] if self.is_initialized else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values in full precision; None before the first token."""
        return None if self.store.keys is None else self.store.keys.dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring their buffers along."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a layer's tokens come through its cache, which knows of the step.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(f"layer {self.number}: call update() of the CompressedCache, not of one of its layers")

    def reset(self) -> None:
        """Refused: see `CompressedCache.reset`."""
        raise _one_layer("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: see `CompressedCache.reorder_cache`."""
        raise _one_layer("reorder_cache")

    def crop(self, max_length: int) -> None:
        """Refused: see `CompressedCache.crop`."""
        raise _one_layer("crop")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: see `CompressedCache.batch_repeat_interleave`."""
        raise _one_layer("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: see `CompressedCache.batch_select_indices`."""
        raise _one_layer("batch_select_indices")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover every column seen, whatever is kept."""
        return self.sequence.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, so that rotary positions go on after eviction."""
        return self.sequence.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        """Moves the layer's buffers to CPU memory."""
        self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Brings the layer's buffers back to their device."""
        if self.device is not None:
            self.store.to(self.device)


def _one_layer(operation: str) -> CacheStateError:
    return CacheStateError(
        f"{operation}: one layer cannot be changed alone, since all layers share what the cache has seen; call "
        f"{operation}() of the cache"
    )
