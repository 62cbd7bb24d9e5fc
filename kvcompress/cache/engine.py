"""When each stage runs: one compressed cache's state, from the start of a forward to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import pipeline
from kvcompress.cache.allocation import Allocation, allocate, floors, protection, row_total
from kvcompress.cache.decoding import attend_one, evict
from kvcompress.cache.forward import Forward, valid_tokens
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.scoring import attend_and_score
from kvcompress.cache.selection import shrink
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.context import LayerWeights
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout


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
        self.stores = [QuantizedStore(quantizer, heads, i) if quantizer else DenseStore(heads) for i in range(layers)]
        self.sequence = Sequence()
        self.allocation: Allocation | None = None
        self.statistics: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.recording = False
        self.layout: ImageLayout | None = None
        self._reduced: Reduction | None = None  # of a forward whose last layer has attended
        self._forward: Forward | None = None
        self._waiting: str | None = None  # kind of the forward whose eviction waits: "scored" or "decoded"

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
        """Raises CacheStateError if a forward failed half-way."""
        if self._forward is not None:
            raise self._broken()

    def _begin(self, query: Tensor, mask: Tensor | None) -> None:
        self.check_ready()
        batch, _, queries, _ = query.shape
        sequence = self.sequence
        new_valid = valid_tokens(mask, batch, queries, sequence)
        spans = None if new_valid is None else [row.nonzero().flatten() for row in new_valid]
        scores = sequence.seen == 0 or queries > 1 or spans is not None
        if self._waiting:
            self.recording = False  # nobody cropped after the last forward, so nobody is rolling back
            self.compress()
        first = sequence.seen
        columns = torch.arange(first, first + queries, dtype=torch.int32, device=query.device).unsqueeze(0)
        forward, layout, self.layout = Forward(columns, spans, scores), self.layout, None
        self._reduced = None
        sequence.extend(batch, queries, new_valid, scores)
        if layout is not None and self.config.reducer is not None:
            with policy_errors(self.config.reducer):
                points = self.config.reducer.acts_after(len(self.stores))
            if points:
                forward.reduction = Reduction(self.config.reducer, points, layout, sequence, first, spans)
        if not scores:
            forward.limits = self.limits()
            if forward.limits is not None and self.config.budget.fraction is None:
                forward.rooms = [1 + max(limits) for limits in forward.limits]
        self._forward = forward

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
        if forward.spans is None and store.rows_alike and self.sequence.rows_alike:
            output = attend_and_score(layer, store, slice(None), before[0], query, *rest)
        else:
            output = query.new_zeros(*query.shape[:3], value.shape[3])
            for row in range(query.shape[0]):
                span = slice(None) if forward.spans is None else forward.spans[row].to(query.device)
                own = query[row : row + 1, :, span]
                if own.shape[2]:
                    rows = slice(row, row + 1)
                    output[rows, :, span] = attend_and_score(layer, store, rows, before[row], own, *rest)
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
            with policy_errors(evictor, layer):
                pinned = [
                    max(evictor.pinned(count, first, recents), first)
                    for count, first in zip(store.counts, held, strict=True)
                ]
            store.pin(pinned, [max(0, sinks - seen) for seen in self.sequence.row_seen])

    # -- rows and rollback ---------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, where eviction waits."""
        self.check_ready()
        waiting, self._waiting = self._waiting, None
        if waiting == "scored":
            self._compress_all(None)
        elif waiting == "decoded" and (limits := self.limits()) is not None:
            for layer, store in enumerate(self.stores):
                evict(layer, store, self.config, self.sequence, limits[layer])
        if waiting:
            for store in self.stores:
                store.pack()

    def can_drop(self, columns: int) -> bool:
        """Whether every layer still holds all the tokens of the last `columns` columns."""
        sequence = self.sequence
        if sequence.valid is None:
            wanted = [columns] * sequence.batch
        else:
            wanted = sequence.valid[:, sequence.seen - columns :].sum(1).tolist()
        return all(store.holds_from(sequence.seen - columns) == wanted for store in self.stores)

    def crop(self, columns: int) -> None:
        """Drops the last columns, then lets the evictions that waited happen.

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
        elif columns:
            for store in self.stores:
                store.crop(sequence.seen - columns)
            sequence.crop(sequence.seen - columns)
        self.compress()

    def select_rows(self, index: Tensor) -> None:
        """Reorders, repeats or drops rows."""
        self.check_ready()
        allocation, sequence, rows_before = self.allocation, self.sequence, self.sequence.batch
        if allocation is not None:
            allocation.select_rows(index)
        sequence.select_rows(index)
        for store, statistics in zip(self.stores, self.statistics, strict=True):
            store.select_rows(index)
            for name, known in statistics.items():
                statistics[name] = known.index_select(0, index.to(known.device))
        if (
            len(index) != rows_before
            and self.config.budget.bytes is not None
            and allocation is not None
            and not self.recording
        ):
            self._compress_all(None)  # bytes are shared by all rows, so each one's share has changed

    def reset(self) -> None:
        """Forgets everything, a failed forward included."""
        self.__init__(self.config, len(self.stores), self.heads)  # type: ignore[misc]

    def _broken(self) -> CacheStateError:
        return CacheStateError(
            "cache: an earlier forward failed half-way, so its layers no longer agree; call reset() and run the prompt "
            "again"
        )
