"""When each stage runs: one compressed cache's state, from the start of a forward to its end."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress import pipeline
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, PolicyError
from kvcompress.kernels import attention, attention_with_lse, merge_attention
from kvcompress.pipeline import Allocation
from kvcompress.sequence import Sequence
from kvcompress.shapes import DecodeContext, LayerContext
from kvcompress.storage import DenseStore


@dataclass
class Forward:
    """A forward pass in progress.

    Attributes:
        first_column: column of its first token.
        queries: number of its columns.
        spans: per row, indices of its columns that are no padding; None if none is.
        scores: whether it scores (the first forward, and every one of several tokens) or decodes.
        next_layer: layer whose attention comes next.
        local: the allocation, where it needs no scores and is known from the start.
        recent_from: first recent column per row, on each device that asked.
    """

    first_column: int
    queries: int
    spans: list[Tensor] | None
    scores: bool
    next_layer: int = 0
    local: Allocation | None = None


class Engine:
    """Stores, allocation and phase of one cache; knows nothing of transformers.

    Attributes:
        config: the policies.
        stores: the layers' buffers.
        sequence: the tokens seen.
        allocation: the last allocation; None before the first.
        recording: whether eviction waits for the next crop (assisted decoding).
    """

    def __init__(self, config: CompressionConfig, layers: int) -> None:
        """Starts with nothing seen."""
        self.config = config
        self.stores = [DenseStore() for _ in range(layers)]
        self.sequence = Sequence()
        self.allocation: Allocation | None = None
        self.recording = False
        self._forward: Forward | None = None
        self._pinned: list[Tensor | None] = [None] * layers
        self._waiting: str | None = None  # kind of the forward whose eviction waits: "scored" or "decoded"

    # -- a forward -----------------------------------------------------------------------------------------------------

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Stores a layer's new tokens, attends, scores, and evicts what may go.

        Args:
            layer: index of the decoder layer; layers come in order.
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, kv_heads, queries, head_dim]`.
            value: like `key`.
            mask: None, or bool `[batch, 1, queries, columns]` over all columns seen.
            scale: factor on the logits.

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
            output = self._attend_and_score(layer, store, forward, query, key, value, scale)
        else:
            output = self._attend_one(layer, store, forward, query, key, value, scale)
        forward.next_layer += 1
        if forward.next_layer == len(self.stores):
            self._finish(forward)
        return output

    def check_ready(self) -> None:
        """Raises CacheStateError if a forward failed half-way."""
        if self._forward is not None:
            raise self._broken()

    def _begin(self, query: Tensor, mask: Tensor | None) -> None:
        self.check_ready()
        batch, _, queries, _ = query.shape
        sequence = self.sequence
        if sequence.batch not in (0, batch):
            raise CacheStateError(
                f"batch: the cache holds {sequence.batch} rows, this forward has {batch}; call reset() for another batch, "
                "or batch_repeat_interleave / batch_select_indices to change the rows"
            )
        new_valid = None
        if mask is not None:
            visible = mask[:, 0, -1]
            new_valid = visible[:, sequence.seen :]
            if sequence.seen and not bool(new_valid[:, -1].any()):
                raise too_short(sequence.seen, queries)
            if bool(new_valid.all()):
                new_valid = None
        spans = None if new_valid is None else [row.nonzero().flatten() for row in new_valid]
        scores = sequence.seen == 0 or queries > 1 or spans is not None
        if self._waiting:
            self.recording = False  # nobody cropped after the last forward, so nobody is rolling back
            self.compress()
        self._forward = Forward(sequence.seen, queries, spans, scores)
        sequence.extend(batch, queries, new_valid)

    def _finish(self, forward: Forward) -> None:
        if self.recording:
            self._waiting = "scored" if forward.scores else "decoded"
        elif forward.scores:
            self._compress_all(forward)
        self._forward = None

    def _compress_all(self, forward: Forward | None) -> None:
        config = self.config
        if config.evictor is None:
            return
        if forward is not None and forward.local is not None:
            self.allocation = forward.local
        else:
            self.allocation = pipeline.compress(self.stores, config, self.sequence)
            for layer in range(len(self.stores)):
                self._pin(layer)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _attend_and_score(
        self, layer: int, store: DenseStore, forward: Forward, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends and scores row by row where rows differ, all rows at once where they do not."""
        before = list(store.counts) or [0] * query.shape[0]
        store.append(key, value, forward.first_column, forward.spans)
        if forward.spans is None and store.is_even:
            output = self._attend_rows(layer, store, slice(None), before[0], query, scale)
        else:
            output = query.new_zeros(*query.shape[:3], value.shape[3])
            for row in range(query.shape[0]):
                span = slice(None) if forward.spans is None else forward.spans[row].to(query.device)
                own = query[row : row + 1, :, span]
                if own.shape[2]:
                    rows = slice(row, row + 1)
                    output[rows, :, span] = self._attend_rows(layer, store, rows, before[row], own, scale)
        if self.config.evictor is not None and not self.config.allocator.reads_importance and not self.recording:
            self._compress_local(layer, store, forward)
        return output

    def _attend_rows(
        self, layer: int, store: DenseStore, rows: slice, past: int, query: Tensor, scale: float
    ) -> Tensor:
        """Attention of rows without padding over `past` older slots and their own new ones, and their scores."""
        keys, values, columns = (tensor[rows, :, : past + query.shape[2]] for tensor in store.used())
        scorer = self.config.scorer
        reads_attention = scorer is not None and scorer.reads_attention
        lse = None
        if past == 0 and not reads_attention:
            output = attention(query, keys, values, scale, causal=True)
        else:
            output, lse = attention_with_lse(query, keys[:, :, past:], values[:, :, past:], scale, causal=True)
            if past:
                older = attention_with_lse(query, keys[:, :, :past], values[:, :, :past], scale, causal=False)
                output, lse = merge_attention(output, lse, *older)
        if scorer is not None:
            first = rows.start or 0
            context = LayerContext(
                layer=layer,
                query=query,
                keys=keys,
                values=values,
                lse=lse if reads_attention else None,
                scaling=scale,
                index=self.sequence.index_of(columns, rows),
                seen=self.sequence.row_seen[first],
                is_image=self.sequence.images_at(columns, rows),
            )
            scores = scorer.score(context)
            if scores.shape != keys.shape[:3] or not bool(scores.isfinite().all()):
                came = "NaN or infinite scores" if scores.shape == keys.shape[:3] else f"the shape {tuple(scores.shape)}"
                raise PolicyError(
                    f"scorer {scorer.name}: layer {layer}: must return finite scores of the shape "
                    f"{tuple(keys.shape[:3])} [batch, kv_heads, tokens]; got {came}"
                )
            store.score(rows, keys.shape[2], scores, add=scorer.accumulates)
        return output

    def _compress_local(self, layer: int, store: DenseStore, forward: Forward) -> None:
        """Compresses a layer as soon as it ran, for allocators that need no scores of other layers."""
        if forward.local is None:
            new = [forward.queries] * len(store.counts) if forward.spans is None else [len(s) for s in forward.spans]
            held = [
                other.counts if index <= layer else [count + more for count, more in zip(other.counts or [0] * len(new), new)]
                for index, other in enumerate(self.stores)
            ]
            forward.local = pipeline.allocate(self.config, self.sequence, self.stores, held, None, None)
        pipeline.shrink(layer, store, self.config, self.sequence, forward.local.budgets[layer])
        self._pin(layer)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _attend_one(
        self, layer: int, store: DenseStore, forward: Forward, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """A decode step: writes one token, attends over all slots, frees one if the layer is over its budget."""
        store.write(key, value, forward.first_column, self._room(layer))
        batch, heads, _, head_dim = query.shape
        keys, values, columns = store.used()
        mask = None
        if not store.is_full:
            mask = (columns >= 0).unsqueeze(2).expand(-1, keys.shape[1], -1, -1)
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        if not self.recording:
            self._evict(layer, store)
        return output.reshape(batch, heads, 1, values.shape[3])

    def _evict(self, layer: int, store: DenseStore) -> None:
        """Frees slots while rows are over their budget, by the evictor's decode rule."""
        evictor, allocation = self.config.evictor, self.allocation
        if evictor is None or allocation is None or not evictor.evicts_at_decode:
            return
        limits = [self.limit(layer, row) for row in range(len(store.counts))]
        while over := [row for row, count in enumerate(store.counts) if count > limits[row]]:
            pinned = self._pinned[layer]
            assert pinned is not None
            columns = store.used()[2]
            context = DecodeContext(
                columns=columns,
                importance=None if store.scores is None else store.scores[:, :, : store.length],
                pinned_before=pinned,
                recent_from=self._recent_from(columns.device),
            )
            store.free(evictor.victim(context), over)

    def limit(self, layer: int, row: int) -> int:
        """Slots that a layer may hold for a row now: its share of what the budget gives for the tokens seen."""
        assert self.allocation is not None
        seen, layers = self.sequence.row_seen[row], len(self.stores)
        total = pipeline.row_total(self.config.budget, seen, self.stores, self.sequence.batch)
        spent = self.allocation.spent[row]
        share = self.allocation.budgets[layer][row] * total // spent if spent else total // layers
        sinks, recents = pipeline.protection(self.config)
        return max(share, min(seen, sinks + recents))

    def _room(self, layer: int) -> int | None:
        """Most slots that a layer's buffers will ever need, where the budget is a fixed number."""
        evictor = self.config.evictor
        fixed = evictor is not None and evictor.evicts_at_decode and self.config.budget.fraction is None
        if not fixed or self.allocation is None:
            return None
        return 1 + max(self.limit(layer, row) for row in range(self.sequence.batch))

    def _recent_from(self, device: torch.device) -> Tensor:
        recents = pipeline.protection(self.config)[1]
        if self.sequence.valid is None:
            return torch.full((1, 1, 1), self.sequence.seen - recents, device=device)
        return self.sequence.column_of([max(0, seen - recents) for seen in self.sequence.row_seen], device)

    def _pin(self, layer: int) -> None:
        """Works out which slots decode steps never evict, as a column per row and set."""
        store, evictor = self.stores[layer], self.config.evictor
        if evictor is None:
            return
        sinks, recents = pipeline.protection(self.config)
        columns, seen = store.used()[2].long(), self.sequence.seen
        pinned = [evictor.pinned(count, sinks, recents) for count in store.counts]
        index = torch.tensor(pinned, device=columns.device)[:, None, None].expand(-1, columns.shape[1], 1)
        beyond = F.pad(columns.masked_fill(columns < 0, seen), (0, 1), value=seen)
        first_loose = beyond.gather(-1, index.clamp(max=store.length))
        self._pinned[layer] = torch.maximum(first_loose, self.sequence.column_of([sinks] * len(pinned), columns.device))

    # -- rows and rollback ---------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, where eviction waits."""
        self.check_ready()
        waiting, self._waiting = self._waiting, None
        if waiting == "scored":
            self._compress_all(None)
        elif waiting == "decoded":
            for layer, store in enumerate(self.stores):
                self._evict(layer, store)

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
                "activate_past_recording() before the forward that may be undone, or take copy.deepcopy(cache) before it"
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
        allocation, sequence = self.allocation, self.sequence
        if allocation is not None and (len(index) != sequence.batch or not _rows_alike(allocation)):
            allocation.select_rows(index.tolist())
        sequence.select_rows(index)
        for layer, store in enumerate(self.stores):
            store.select_rows(index)
            pinned = self._pinned[layer]
            if pinned is not None:
                self._pinned[layer] = pinned.index_select(0, index.to(pinned.device))

    def reset(self) -> None:
        """Forgets everything, a failed forward included."""
        self.__init__(self.config, len(self.stores))  # type: ignore[misc]

    def _broken(self) -> CacheStateError:
        return CacheStateError(
            "cache: an earlier forward failed half-way, so its layers no longer agree; call reset() and run the prompt again"
        )


def too_short(seen: int, queries: int) -> CacheStateError:
    """The error for a turn that does not carry the whole conversation."""
    return CacheStateError(
        f"input: the cache has seen {seen} tokens, and with the {queries} new ones attention_mask must cover "
        f"{seen + queries}; pass the ids and the mask of the whole conversation, or call reset() for a new one"
    )


def _rows_alike(allocation: Allocation) -> bool:
    return all(count == layer[0] for layer in allocation.budgets for count in layer) and not allocation.notes


__all__ = ["Engine", "Forward", "List", "too_short"]
