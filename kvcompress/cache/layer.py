"""One decoder layer of a compressed cache: the flow of data through a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.contract import LayerContract
from kvcompress.cache.counts import Counts
from kvcompress.cache.ranking import Ranked, importance_of, without_unknown
from kvcompress.cache.recent import Recent
from kvcompress.cache.repeating import Near
from kvcompress.cache.scoring import Unscored, needs_of, reads_attention, score
from kvcompress.cache.selection import compress_soon
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import Decode, Prefill, Step
from kvcompress.kernels import Softmax, attend_blocks, with_sinks
from kvcompress.policies.context import LayerWeights
from kvcompress.policies.projection import projected_norm


class CompressedLayer(LayerContract):  # type: ignore[no-untyped-call]
    """One decoder layer of a `CompressedCache`: what it holds, and what becomes of it in a step.

    Attributes:
        unscored: the last step, while it may be undone.
        weights: gives the layer's own weights.
    """

    unscored: Unscored | None = None
    weights: Callable[[], LayerWeights] = LayerWeights

    def forget(self, sequence: Sequence) -> None:
        """Starts anew, with what is seen from now on in `sequence`."""
        super().forget(sequence)
        self.unscored = None

    def select_rows(self, index: Tensor, rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        super().select_rows(index, rows)
        if self.unscored is not None:
            self.unscored = self.unscored.of_rows(index)

    # -- a step --------------------------------------------------------------------------------------------------------

    def attend(
        self,
        step: Step,
        table: SlotTable | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax: Softmax,
        weights: Callable[[], LayerWeights],
    ) -> Tensor:
        """Stores this step's tokens, attends over all, scores, and gives up what is over the budget.

        Args:
            step: the forward in progress.
            table: where tokens lie, in a decode step.
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, kv_heads, queries, head_dim]`.
            value: like `key`.
            softmax: what the model makes of their products.
            weights: gives the layer's own weights, for scorers that read them.

        Returns:
            The attention output, `[batch, heads, queries, head_dim]`.
        """
        if isinstance(step, Decode):
            assert table is not None
            self.store.write(key, value, table.write[self.number])
            if step.place is not None and self.recent is not None:
                self.recent.write(query, step.place)
            return self._attend_slots(step, query, softmax)
        self._remember(query, softmax, weights)
        query, key, value = (step.aligned(tensor) for tensor in (query, key, value))
        past = self._append(step, key, value)
        output, shows = self._attend_blocks(step, query, past, softmax)
        if step.evicts:
            score(self, step, shows)
        elif self.config.scorer is not None or needs_of(self.config):
            self.unscored = shows
        if step.local is not None:  # sizes are known before the last layer ran
            compress_soon(self, step)
        return step.restored(output)

    def _attend_slots(self, step: Decode, query: Tensor, softmax: Softmax) -> Tensor:
        """Attention of one query per row over the slots in use."""
        used = step.used(self.number, query.device)
        if softmax.softcap is None and softmax.sinks is None:
            return self.store.attend(query, softmax.scaling, used)
        output, lse = self.store.attend_with_lse(query, softmax.scaling, used, softmax.softcap)
        return with_sinks(output, lse, softmax.sinks)[0]

    def _attend_blocks(self, step: Prefill, query: Tensor, past: int, softmax: Softmax) -> tuple[Tensor, Unscored]:
        """Attention of several queries over all slots, of which so many are older; and what it shows."""
        valid, last = self.valid(step), None if step.last_seen is None else step.last_seen.to(query.device)
        if step.part is not None:
            near = Near.of(step.part, past)
            output, near_lse = near.attend(query, *self.every_slot(), softmax, valid, last)
            shown = (softmax.scaling, softmax.softcap, self.weights, self.heads_part, last)
            return output, Unscored(query, near_lse, *shown)
        wants_lse, blocks = reads_attention(self.config) or softmax.sinks is not None, self.store.blocks(self.slots)
        output, lse = attend_blocks(query, blocks, past, softmax.scaling, valid, wants_lse, softmax.softcap, last)
        if lse is not None:
            output, lse = with_sinks(output, lse, softmax.sinks)
        return output, Unscored(query, lse, softmax.scaling, softmax.softcap, self.weights, self.heads_part, last)

    def _remember(self, query: Tensor, softmax: Softmax, weights: Callable[[], LayerWeights]) -> None:
        """Takes note of what scores are found by between two forwards of several tokens, for evictors that ask then."""
        self.weights, evictor = weights, self.config.evictor
        if evictor is not None and evictor.cuts_every is not None:
            self.recent = Recent.room_for(self.recent, query, evictor.looks_back(self.config.scorer), softmax)

    def _append(self, step: Prefill, key: Tensor, value: Tensor) -> int:
        """Stores the tokens of a step after the others; returns the slots before them."""
        assert step.index is not None
        past = self.store.packed + self.slots
        self.store.append(key, value, self.slots)
        if self.index is None:
            self.index, self.device, self.held = (
                step.index,
                key.device,
                np.zeros((len(step.row_new), 1), dtype=np.int64),
            )
        else:
            new = step.index.to(self.index.device).expand(-1, self.index.shape[1], -1)
            self.index = torch.cat([self.index[..., :past], new], 2)
        self.slots += key.shape[2]
        self.held = self.held + step.row_new[:, None]
        return past

    def valid(self, step: Prefill) -> Tensor | None:
        """Which slots hold a token, `[batch, sets, slots]`; None if all do."""
        assert self.index is not None
        if (self.held == self.index.shape[2]).all():
            return None
        index = self.index if self.index.shape[1] == self.held.shape[1] else self.index[:, :1]
        valid: Tensor = step.once("valid", index, lambda: index >= 0)
        return valid

    # -- what of it stays ----------------------------------------------------------------------------------------------

    def ranked(self, step: Prefill | None = None) -> Ranked:
        """Token index and importance of the slots over all heads of the layer, those of other processes included."""
        assert self.index is not None
        index = self._gathered(self.index, -1) if self.heads_part else self.index
        if self.config.scorer is None or self.scores is None:
            return index, None
        full = bool((self.held == self.index.shape[2]).all())
        known = (self.config.scorer, self.scores, self.index, self.sequence)
        importance = importance_of(*known, self.number, full, step)
        if (self.sequence.scored.end < self.sequence.row_seen).any():
            importance = without_unknown(importance)
        return index, self._gathered(importance, 0.0)

    def _gathered(self, of_slots: Tensor, fill: float) -> Tensor:
        """What all processes hold of the layer's slots, filled where one holds less than others."""
        return self.heads.gather_slots(of_slots, fill) if self.uneven else self.heads.gather(of_slots)

    def value_norms(self) -> Tensor:
        """L1 norm of each slot's value after the output projection, `[batch, kv_heads, slots]`, for evictors."""
        evictor = self.config.evictor
        assert evictor is not None
        asks = f"evictor {evictor.name}: layer {self.number}: {{}}, or choose another evictor"
        return projected_norm(self.every_slot()[1], self.weights(), 1, asks)
