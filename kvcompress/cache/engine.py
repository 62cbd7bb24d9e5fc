"""When each stage runs: one compressed cache's state, from the start of a forward to its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import pipeline
from kvcompress.cache.allocation import Allocation, allocate, floors, protection, row_total
from kvcompress.cache.decoding import attend_one, evict
from kvcompress.cache.forward import Forward, hidden_tokens, valid_tokens
from kvcompress.cache.importance import every_head
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.scoring import Queries, attend_and_score, score
from kvcompress.cache.selection import shrink
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.context import LayerWeights
from kvcompress.policies.images import ImageLayout


@dataclass
class Scored:
    """What a forward whose eviction waits has scored, so that a crop can take some of its queries back.

    Attributes:
        first: its first column.
        last: what `Sequence.last` was before it.
        before: scores and statistics of each layer before it.
        queries: its queries in each layer, row by row where rows differ.
    """

    first: int
    last: tuple[list[int], list[int]]
    before: list[tuple[Tensor | None, dict[str, Tensor]]] = field(default_factory=list)
    queries: list[list[Queries]] = field(default_factory=list)

    def remember(self, scores: Tensor | None, statistics: dict[str, Tensor]) -> None:
        """Takes down what the next layer knows before it is scored."""
        known = {name: values.clone() for name, values in statistics.items()}
        self.before.append((None if scores is None else scores.clone(), known))


class Engine:
    """Stores, allocation and phase of one cache; knows nothing of transformers.

    Attributes:
        config: the policies.
        stores: the layers' buffers.
        sequence: the tokens seen.
        allocation: the last allocation; None before the first.
        statistics: what the allocator reads of each layer's last scoring forward, by name, `[batch]`.
        heads: which of every layer's heads this process holds.
        recording: whether eviction waits for the next crop (assisted decoding).
        layout: where the images of the forward about to begin are, for the reducer; None if there are none.
    """

    def __init__(self, config: CompressionConfig, layers: int, heads: HeadGroup = ALONE) -> None:
        """Starts with nothing seen."""
        self.config = config
        self.heads = heads
        quantizer = config.quantizer
        self.stores = [QuantizedStore(quantizer, heads) if quantizer else DenseStore(heads) for _ in range(layers)]
        self.sequence = Sequence()
        self.allocation: Allocation | None = None
        self.statistics: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.recording = False
        self.layout: ImageLayout | None = None
        self._reduced: Reduction | None = None  # of a forward whose last layer has attended
        self._forward: Forward | None = None
        self._waiting: str | None = None  # kind of the forward whose eviction waits: "scored" or "decoded"
        self._scored: Scored | None = None  # the forward whose eviction waits, if it scored
        self._half_done = False  # whether an operation has begun and not ended

    def writable(self) -> AbstractContextManager[Any]:
        """Lets buffers that were made in inference mode be written to, also by a caller who has left it."""
        return self.stores[0].writable()

    # -- a forward -----------------------------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        weights: Callable[[], LayerWeights] = LayerWeights,
    ) -> Tensor:
        """Stores a layer's new tokens, attends, scores, and evicts what may go.

        Args:
            layer: index of the decoder layer; layers come in order.
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, kv_heads, queries, head_dim]`.
            value: like `key`.
            mask: None, or bool `[batch, 1, queries, columns]` over all columns seen.
            scale: factor on the logits.
            weights: gives the layer's own weights, for scorers that read them.

        Returns:
            The attention output, `[batch, heads, queries, head_dim]`.
        """
        if layer == 0:
            self._begin(query, mask)
        forward = self._forward
        if forward is None or forward.next_layer != layer:
            raise self._broken()
        store = self.stores[layer]
        if forward.scores:
            output = self._attend_and_score(layer, store, forward, query, key, value, scale, weights())
        else:
            output = attend_one(store, query, key, value, scale, self.sequence.seen - 1, self._room(layer, forward))
            if forward.limits is not None and not self.recording:
                evict(layer, store, self.config, self.sequence, forward.limits[layer])
            if not self.recording:
                store.pack()
        forward.next_layer += 1
        if forward.next_layer == len(self.stores):
            self._finish(forward)
        return output

    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """Lets the reducer act between two layers; before every layer of a forward, in order.

        Args:
            layer: index of the layer that comes next.
            hidden: hidden states of the tokens that came so far, `[batch, tokens, hidden]`.

        Returns:
            Hidden states of the tokens that go on, and the reduction; None where nothing was removed so far.
        """
        forward = self._forward
        if forward is None or forward.reduction is None or forward.next_layer != layer:
            return None
        reduction = forward.reduction
        if layer < reduction.points[0]:
            return None
        if layer in reduction.points:
            hidden = reduction.reduce(layer, hidden)
            forward.columns, forward.spans = reduction.columns, reduction.spans
        return hidden, reduction

    def spread(self, hidden: Tensor) -> Tensor | None:
        """What the last layer gave, in the columns that went into the first, once; None if nothing was reduced."""
        reduction, self._reduced = self._reduced, None
        return None if reduction is None else reduction.spread(hidden)

    def check_ready(self) -> None:
        """Raises CacheStateError if a forward, or another operation, failed half-way."""
        if self._forward is not None or self._half_done:
            raise self._broken()

    @contextmanager
    def _changing(self, undo: bool) -> Iterator[None]:
        """Surrounds an operation that changes the cache.

        Args:
            undo: whether everything is put back where it fails, which keeps the old buffers until it ends; for
                operations that call policies. Without it, a cache whose operation fails is refused until `reset()`.
        """
        self.check_ready()
        before = self._state() if undo else {}
        self._half_done = True
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise
        self._half_done = False

    def _state(self) -> dict[str, Any]:
        """What `_changing` puts back; tensors are not copied, so they must not be written to meanwhile."""
        return {
            **self.__dict__,
            "stores": [store.snapshot() for store in self.stores],
            "sequence": self.sequence.snapshot(),
            "allocation": copy.copy(self.allocation),
            "statistics": [dict(known) for known in self.statistics],
        }

    def _begin(self, query: Tensor, mask: Tensor | None) -> None:
        self.check_ready()
        batch, _, queries, _ = query.shape
        sequence = self.sequence
        new_valid = valid_tokens(mask, batch, queries, sequence)
        hidden = hidden_tokens(mask, sequence)
        spans = None if new_valid is None else [row.nonzero().flatten() for row in new_valid]
        scores = sequence.seen == 0 or queries > 1 or spans is not None
        first = sequence.seen
        columns = torch.arange(first, first + queries, dtype=torch.int32, device=query.device).unsqueeze(0)
        forward, layout, self.layout = Forward(columns, spans, scores), self.layout, None
        self._forward = forward  # whatever fails from here on leaves a cache that is refused
        if self._waiting:
            self.recording = False  # nobody cropped after the last forward, so nobody is rolling back
            self._evict_waiting()
        if hidden is not None:
            self._hide(hidden)
        self._reduced = None
        self._scored = Scored(first, sequence.last) if scores and self.recording and self._scores else None
        sequence.extend(batch, queries, new_valid, scores)
        if layout is not None and self.config.reducer is not None:
            points = self.config.reducer.acts_after(len(self.stores))
            if points:
                forward.reduction = Reduction(self.config.reducer, points, layout, sequence, first, spans)
        if not scores:
            forward.limits = self.limits()
            if forward.limits is not None and self.config.budget.fraction is None:
                forward.rooms = [1 + max(limits) for limits in forward.limits]

    def _hide(self, hidden: Tensor) -> None:
        """Drops tokens that a mask hides from now on.

        Every head of a row goes on with as many tokens as the one that lost most, those of highest importance.
        """
        self.sequence.hide(hidden)
        for layer, store in enumerate(self.stores):
            columns, importance = every_head(layer, store, self.config, self.sequence)
            gone = hidden.to(columns.device).gather(1, columns.clamp(min=0).long().flatten(1)).view(columns.shape)
            stays = (columns >= 0) & ~gone
            counts = stays.sum(-1).amin(1)
            if columns.shape[1] > 1:
                order = columns.double() if importance is None else importance.double()
                order = order.masked_fill(self.sequence.protected(columns, *protection(self.config)), torch.inf)
                rank = (
                    order.masked_fill(~stays, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
                )
                stays &= rank < counts[:, None, None]
            store.keep(store.heads.own(stays), counts.tolist())
            self._pin(layer)

    def _finish(self, forward: Forward) -> None:
        if self.recording:
            self._waiting = "scored" if forward.scores else "decoded"
        elif forward.scores:
            self._compress_all(forward)
        self._forward, self._reduced = None, forward.reduction

    def _compress_all(self, forward: Forward | None) -> None:
        config = self.config
        if config.evictor is None:
            return
        if forward is not None and forward.local is not None:
            self.allocation = forward.local
        else:
            self.allocation = pipeline.compress(self.stores, config, self.sequence, self.statistics)
            for layer, store in enumerate(self.stores):
                self._pin(layer)
                store.pack()

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _attend_and_score(
        self,
        layer: int,
        store: DenseStore,
        forward: Forward,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        weights: LayerWeights,
    ) -> Tensor:
        """Attends and scores row by row where rows differ, all rows at once where they do not."""
        config = self.config
        needs = config.allocator.needs if config.evictor is not None else ()
        rest = (scale, weights, config.scorer, needs, self.statistics[layer], self.sequence)
        before = store.counts if store.batch else [0] * query.shape[0]
        store.append(key, value, forward.columns, forward.spans)
        if self._scored is not None:
            self._scored.remember(store.used_scores(), self.statistics[layer])
        attended = []
        if forward.spans is None and store.rows_alike and self.sequence.rows_alike:
            output, queries = attend_and_score(layer, store, slice(None), before[0], query, *rest)
            attended.append(queries)
        else:
            output = query.new_zeros(*query.shape[:3], value.shape[3])
            for row in range(query.shape[0]):
                span = slice(None) if forward.spans is None else forward.spans[row].to(query.device)
                own = query[row : row + 1, :, span]
                if own.shape[2]:
                    rows = slice(row, row + 1)
                    output[rows, :, span], queries = attend_and_score(layer, store, rows, before[row], own, *rest)
                    attended.append(queries)
        if self._scored is not None:
            self._scored.queries.append(attended)
        if forward.reduction is not None:
            forward.reduction.observe(layer, store, query, scale)
        if config.evictor is None:
            if not self.recording:
                store.pack()
        elif self._local(forward):
            self._compress_local(layer, store, forward)
        return output

    def _local(self, forward: Forward) -> bool:
        """Whether layers are compressed as soon as they ran: sizes are known then, unless a reducer acts."""
        return not (self.config.allocator.reads_importance or self.recording or forward.reduction is not None)

    def _room(self, layer: int, forward: Forward) -> int | None:
        return None if forward.rooms is None else forward.rooms[layer]

    def _compress_local(self, layer: int, store: DenseStore, forward: Forward) -> None:
        """Compresses a layer as soon as it ran, for allocators that need no scores of other layers."""
        if forward.local is None:  # the first layer has its new tokens, the others will have them
            tokens = forward.columns.shape[1]
            new = [tokens] * store.batch if forward.spans is None else [len(span) for span in forward.spans]
            held = [[sum(pair) for pair in zip_longest(other.counts, new, fillvalue=0)] for other in self.stores[1:]]
            held = [store.counts, *held]
            forward.local = allocate(self.config, self.sequence, self.stores, held, None, None)
        shrink(layer, store, self.config, self.sequence, forward.local)
        self._pin(layer)
        store.pack()

    def limits(self) -> list[list[int]] | None:
        """Slots that each layer may hold now, `[layers][batch]`; `[layers][1]` while all rows agree.

        Every layer has its share of what the budget gives for the tokens seen, and the protected tokens in any case.
        None if nothing is ever evicted while decoding.
        """
        evictor, allocation, sequence = self.config.evictor, self.allocation, self.sequence
        if evictor is None or evictor.frees == "nothing" or allocation is None:
            return None
        rows = range(1 if allocation.rows_alike and sequence.rows_alike else sequence.batch)
        totals = [row_total(self.config.budget, sequence.row_seen[r], self.stores, sequence.batch) for r in rows]
        least = floors(self.config, sequence)
        spent, even = allocation.spent, [total // len(self.stores) for total in totals]
        return [
            [max(share[r] * totals[r] // spent[r] if spent[r] else even[r], least[r]) for r in rows]
            for share in allocation.budgets
        ]

    def _pin(self, layer: int) -> None:
        """Decides which tokens of a layer never leave by age: sinks, and what the evictor pins."""
        store, evictor = self.stores[layer], self.config.evictor
        if evictor is not None and evictor.frees == "oldest":
            sinks, recents = protection(self.config)
            held = self.sequence.first_given(layer, sinks)
            pinned = [
                max(evictor.pinned(count, first, recents), first)
                for count, first in zip(store.counts, held, strict=True)
            ]
            store.pin(pinned, [max(0, sinks - seen) for seen in self.sequence.row_seen])

    # -- rows and rollback ---------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, where eviction waits; all or nothing."""
        with self._changing(undo=self._waiting is not None):
            self._evict_waiting()

    def _evict_waiting(self) -> None:
        waiting = self._waiting
        if waiting == "decoded" or (waiting and self.config.merger is not None):
            for store in self.stores:
                store.unshare()
        if waiting == "scored":
            self._compress_all(None)
        elif waiting == "decoded" and (limits := self.limits()) is not None:
            for layer, store in enumerate(self.stores):
                evict(layer, store, self.config, self.sequence, limits[layer])
        if waiting:
            for store in self.stores:
                store.pack()
        self._waiting = self._scored = None

    def can_drop(self, columns: int) -> bool:
        """Whether every layer still holds all the tokens of the last `columns` columns."""
        sequence = self.sequence
        if sequence.valid is None:
            wanted = [columns] * sequence.batch
        else:
            wanted = sequence.valid[:, sequence.seen - columns :].sum(1).tolist()
        return all(store.holds_from(sequence.seen - columns) == wanted for store in self.stores)

    @property
    def _scores(self) -> bool:
        """Whether what is scored ever decides anything."""
        return self.config.evictor is not None and bool(self.config.scorer or self.config.allocator.needs)

    def can_forget(self, columns: int) -> bool:
        """Whether the scores that queries of the last `columns` columns gave to older tokens can be taken back."""
        sequence, scorer = self.sequence, self.config.scorer
        first = sequence.seen - columns
        if not self._scores or not sequence.scored_within(first, sequence.seen):
            return True
        if scorer is not None and scorer.independent and not self.config.allocator.needs:
            return True
        return self._scored is not None and not sequence.scored_within(first, self._scored.first)

    @torch.no_grad()
    def _take_back(self, scored: Scored) -> None:
        """Scores once more with the queries that a crop has left of a forward."""
        needs = self.config.allocator.needs
        left = self.sequence.take_back_last(scored.last, scored.first)
        for layer, store in enumerate(self.stores):
            scores, statistics = scored.before[layer]
            store.take_back_scores(scores)
            self.statistics[layer] = {name: values.clone() for name, values in statistics.items()}
            for queries in scored.queries[layer]:
                count = left[queries.rows.start or 0]
                if count:
                    known = self.statistics[layer]
                    score(layer, store, queries.first(count), self.config.scorer, needs, known, self.sequence)

    def crop(self, columns: int) -> None:
        """Drops the last columns, then lets the evictions that waited happen; all or nothing.

        Raises:
            CacheStateError: if one of them was evicted already; nothing has changed then.
        """
        self.check_ready()
        sequence = self.sequence
        if columns > sequence.seen:
            raise CacheStateError(f"crop: cannot remove {columns} tokens, only {sequence.seen} were seen")
        if columns and not self.can_drop(columns):
            raise CacheStateError(
                f"crop: some layer has already evicted one of the last {columns} tokens, so it cannot go back; call "
                "activate_past_recording() before a forward that may be undone, or take copy.deepcopy(cache) before it"
            )
        if columns == sequence.seen:
            self.reset()
            return
        if columns and not self.can_forget(columns):
            raise CacheStateError(
                f"crop: the last {columns} tokens include some whose queries scored older tokens, which cannot be "
                "taken back; call activate_past_recording() before a forward that may be undone, or take "
                "copy.deepcopy(cache) before it"
            )
        with self._changing(undo=self._waiting is not None):
            if columns:
                for store in self.stores:
                    store.crop(sequence.seen - columns)
                sequence.crop(sequence.seen - columns)
                if self._scored is not None:
                    self._take_back(self._scored)
            self._evict_waiting()

    def select_rows(self, index: Tensor) -> None:
        """Reorders, repeats or drops rows, all of which exist."""
        allocation, sequence = self.allocation, self.sequence
        # Bytes are shared by all rows, so each one's share changes with their number.
        shares_change = (
            len(index) != sequence.batch
            and self.config.budget.bytes is not None
            and allocation is not None
            and not self.recording
        )
        with self._changing(undo=shares_change):
            self._scored = None  # queries of other rows than these
            if allocation is not None:
                allocation.select_rows(index)
            sequence.select_rows(index)
            for store, statistics in zip(self.stores, self.statistics, strict=True):
                store.select_rows(index)
                for name, known in statistics.items():
                    statistics[name] = known.index_select(0, index.to(known.device))
            if shares_change:
                self._compress_all(None)

    def reset(self) -> None:
        """Forgets everything, whatever failed."""
        self.__dict__.update(Engine(self.config, len(self.stores), self.heads).__dict__)

    def _broken(self) -> CacheStateError:
        return CacheStateError(
            "cache: an earlier forward, or another operation on it, failed half-way, so its layers no longer agree; "
            "call reset() and run the prompt again"
        )
