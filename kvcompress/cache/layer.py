"""One decoder layer of a compressed cache: what it holds, and the flow of data through a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.contract import LayerContract
from kvcompress.cache.recent import Recent
from kvcompress.cache.repeating import Near
from kvcompress.cache.selection import (
    Ranked,
    compress,
    importance_of,
    merged,
    without_unknown,
)
from kvcompress.cache.sequence import Counts, Sequence, with_last, without_last
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import Decode, Prefill, Step
from kvcompress.errors import PolicyError
from kvcompress.kernels import attend_blocks, sent, with_sinks
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext, LayerWeights, MergeContext
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.projection import projected_norm
from kvcompress.policies.statistics import STATISTICS


@dataclass(frozen=True)
class Unscored:
    """A step that may be undone, which scores once it is known what stays of it.

    Attributes:
        query: queries of its tokens.
        lse: log-sum-exp of their logits; None if nobody reads attention.
        scaling: factor on the logits.
        weights: gives the layer's own weights.
        last_seen: number of the last of its tokens that each query sees, `[batch, queries]`; None if it is its own.
    """

    query: Tensor
    lse: Tensor | None
    scaling: float
    weights: Callable[[], LayerWeights]
    last_seen: Tensor | None = None

    def of_rows(self, index: Tensor) -> Unscored:
        """The same of some rows."""
        index = index.to(self.query.device)
        lse, last = (None if of is None else of.index_select(0, index) for of in (self.lse, self.last_seen))
        return replace(self, query=self.query.index_select(0, index), lse=lse, last_seen=last)

    def without_last(self, gone: Counts) -> Unscored:
        """The same without so many of each row's last queries; with padding before those of rows that lose more."""
        lse, last = (None if of is None else without_last(of, gone) for of in (self.lse, self._last_seen()))
        if last is not None:
            moved = sent(gone - gone.min(), last.device)[:, None]
            last = (last[:, 0] + moved).clamp(max=last.shape[2] - 1)
        return replace(self, query=without_last(self.query, gone), lse=lse, last_seen=last)

    def _last_seen(self) -> Tensor | None:
        return None if self.last_seen is None else self.last_seen[:, None]


class CompressedLayer(LayerContract):  # type: ignore[no-untyped-call]
    """One decoder layer of a `CompressedCache`: what it holds, and what becomes of it in a step.

    Attributes:
        unscored: the last step, while it may be undone.
        weights: gives the layer's own weights.
    """

    unscored: Unscored | None = None
    weights: Callable[[], LayerWeights] = LayerWeights
    _softcap: float | None = None

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
        scaling: float,
        weights: Callable[[], LayerWeights] = LayerWeights,
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
            softcap: what the model keeps its logits below; None if it lets them be.
            sinks: a logit of each head that the softmax runs over too, and that has no value; None if there is none.

        Returns:
            The attention output, `[batch, heads, queries, head_dim]`.
        """
        if isinstance(step, Decode):
            assert table is not None
            self.store.write(key, value, table.write[self.number])
            if step.place is not None and self.recent is not None:
                self.recent.write(query, step.place)
            used = step.used(self.number, query.device)
            if softcap is None and sinks is None:
                return self.store.attend(query, scaling, used)
            return with_sinks(*self.store.attend_with_lse(query, scaling, used, softcap), sinks)[0]
        self.weights, self._softcap = weights, softcap
        if (evictor := self.config.evictor) is not None and evictor.cuts_every is not None:
            window = evictor.looks_back(self.config.scorer)
            self.recent = Recent.room_for(self.recent, query, window, scaling, softcap, sinks)
        query, key, value = (step.aligned(tensor) for tensor in (query, key, value))
        past = self._append(step, key, value)
        valid = self._valid(step)
        wants_lse, blocks = self._reads_attention or sinks is not None, self.store.blocks(self.slots)
        last = None if step.last_seen is None else step.last_seen.to(query.device)
        if step.part is None:
            output, lse = attend_blocks(query, blocks, past, scaling, valid, wants_lse, softcap, last)
            if lse is not None:
                output, lse = with_sinks(output, lse, sinks)
        else:
            near = Near.of(step.part, past)
            output, lse = near.attend(query, *self.every_slot(), scaling, valid, softcap, last, sinks)
        shows = Unscored(query, lse, scaling, weights, last)
        if step.evicts:
            self._score(step, shows)
        elif self.config.scorer is not None or self._needs:
            self.unscored = shows
        if step.local is not None:  # sizes are known before the last layer ran
            compress([self], step, step.local())
        return step.restored(output)

    # -- prefill -------------------------------------------------------------------------------------------------------

    def value_norms(self) -> Tensor:
        """L1 norm of each slot's value after the output projection, `[batch, kv_heads, slots]`, for evictors."""
        evictor = self.config.evictor
        assert evictor is not None
        asks = f"evictor {evictor.name}: layer {self.number}: {{}}, or choose another evictor"
        return projected_norm(self.every_slot()[1], self.weights(), 1, asks)

    @property
    def _reads_attention(self) -> bool:
        scorer = self.config.scorer
        return bool(self._needs) or (scorer is not None and scorer.reads_attention)

    @property
    def _needs(self) -> tuple[str, ...]:
        return self.config.allocator.needs if self.config.evictor is not None else ()

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

    def _valid(self, step: Prefill) -> Tensor | None:
        """Which slots hold a token, `[batch, sets, slots]`; None if all do."""
        assert self.index is not None
        if (self.held == self.index.shape[2]).all():
            return None
        index = self.index if self.index.shape[1] == self.held.shape[1] else self.index[:, :1]
        valid: Tensor = step.once("valid", index, lambda: index >= 0)
        return valid

    def settle(self, step: Prefill, gone: Counts) -> None:
        """Scores what was left unscored, by the queries of each row but its last so many."""
        unscored, self.unscored = self.unscored, None
        if unscored is not None and gone.min(initial=0) < unscored.query.shape[2]:
            self._score(step, unscored, gone)

    def _score(self, step: Prefill, of: Unscored, gone: Counts | None = None) -> None:
        """Scores every slot by what a step shows, and takes the statistics that the allocator reads.

        Args:
            step: the step in progress.
            of: queries of the step that is to score.
            gone: last tokens of each row in that step, which are about to be taken back.
        """
        scorer, needs = self.config.scorer, self._needs
        observed = step.reduction is not None and step.reduction.observes(self.number)
        if scorer is None and not needs and not observed:
            return
        assert self.index is not None
        (keys, values), index = self.every_slot(), self.index
        valid = self._valid(step)
        if gone is not None and gone.any():
            keys, values, index = (without_last(tensor, gone) for tensor in (keys, values, index))
            of = of.without_last(gone)
            more = sent(gone - gone.min(), index.device)[:, None, None]
            index = index.masked_fill(torch.arange(index.shape[2], device=index.device) < more, -1)
            valid = index[:, : self.held.shape[1]] >= 0
        context = self.context(step, of, keys, values, index, valid)
        if observed:
            assert step.reduction is not None
            step.reduction.observe(replace(context, lse=None))
        for name in needs:
            with policy_errors(self.config.allocator, self.number):
                self.statistics[name] = self.heads.mean(STATISTICS[name](context))
        if scorer is None:
            return
        scores = self.scored(step, scorer, context)
        self.learn(scorer, scores if gone is None or not gone.any() else with_last(scores, gone))

    def score_part(self, step: Prefill, part: slice) -> Tensor:
        """Scores of a part's slots by the step that repeated it, as if what is near were all that the layer holds."""
        scorer, of, index, valid = self.config.scorer, self.unscored, self.index, self._valid(step)
        assert scorer is not None and of is not None and index is not None
        near = Near.of(part, index.shape[2] - of.query.shape[2])
        keys, values, index = (near.taken(tensor) for tensor in (*self.every_slot(), index))
        context = self.context(step, of, keys, values, index, None if valid is None else near.taken(valid))
        return self.scored(step, scorer, context, near.asked)

    def context(
        self, step: Prefill, of: Unscored, keys: Tensor, values: Tensor, index: Tensor, valid: Tensor | None
    ) -> LayerContext:
        """What a scorer sees of the layer."""
        return LayerContext(
            layer=self.number,
            query=of.query,
            keys=keys,
            values=values,
            lse=of.lse if self._reads_attention else None,
            scaling=of.scaling,
            index=index,
            seen=step.seen_on(of.query.device),
            valid=valid,
            is_image=step.once("images", index, lambda: self.sequence.images_at(index)),
            weights=of.weights() if self.config.scorer is not None else LayerWeights(),
            heads=self.heads,
            softcap=self._softcap,
            heads_part=self.heads_part,
            last_seen=of.last_seen,
        )

    def scored(self, step: Prefill, scorer: Scorer, context: LayerContext, part: slice | None = None) -> Tensor:
        """What a scorer says of the slots that it was shown, in float32; what may be wrong with it is noted."""
        with policy_errors(scorer, self.number):
            scores = scorer.score(context) if part is None else scorer.score_part(context, part)
            shape = tuple(scores.shape)
        expected = tuple(context.keys[:, :, part or slice(None)].shape[:3])
        label = f"scorer {scorer.name}: layer {self.number}: must return finite scores of the shape {expected}"
        if shape != expected:
            raise PolicyError(f"{label} [batch, kv_heads, tokens]; got the shape {shape}")
        scores = scores.to(torch.float32)
        step.problems.note_unless_finite(f"{label} [batch, kv_heads, tokens]; got NaN or infinite scores", scores)
        return scores

    def learn(self, scorer: Scorer, scores: Tensor) -> None:
        """Takes the scores of all slots, on top of those that they have if the scorer accumulates."""
        if scorer.accumulates and self.scores is not None:
            assert self.index is not None
            known = self.scores
            unscored = self.sequence.unscored_before(self.index[..., : known.shape[2]])
            known = known if unscored is None else known.masked_fill(unscored, 0.0)
            scores = scores + F.pad(known, (0, scores.shape[2] - known.shape[2]))
        self.scores = scores

    def ranked(self) -> Ranked:
        """Token index and importance of the slots over all heads of the layer, those of other processes included."""
        assert self.index is not None
        index = self._gathered(self.index, -1) if self.heads_part else self.index
        if self.config.scorer is None or self.scores is None:
            return index, None
        full = bool((self.held == self.index.shape[2]).all())
        importance = importance_of(self.config.scorer, self.scores, self.index, self.sequence, self.number, full)
        if (self.sequence.scored.end < self.sequence.row_seen).any():
            importance = without_unknown(importance)
        return index, self._gathered(importance, 0.0)

    def _gathered(self, of_slots: Tensor, fill: float) -> Tensor:
        """What all processes hold of the layer's slots, filled where one holds less than others."""
        return self.heads.gather_slots(of_slots, fill) if self.uneven else self.heads.gather(of_slots)

    def let_stay(
        self, mask: Tensor, order: Tensor, budget: Counts, importance: Tensor | None, room: Counts | int
    ) -> None:
        """Merges the slots that go into those that stay, if asked for, and gives them back.

        Args:
            mask: slots that stay, `[batch, sets, slots or more]`.
            order: the same in the order of their tokens.
            budget: how many stay in each row and set.
            importance: importance of every slot; None without a scorer.
            room: slots to allocate beyond them.
        """
        assert self.index is not None
        slots = self.index.shape[2]
        kept = mask[..., :slots].to(self.index.device)
        if self.config.merger is not None:
            most = int(budget.max()), int((self.held - budget).max())
            importance = None if importance is None else importance[..., :slots].to(kept.device)
            self._merge(kept, (self.index >= 0) & ~kept, importance, most, decoding=False)
        self.take(kept, order.to(kept.device), budget, room)

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

    # -- decoding ------------------------------------------------------------------------------------------------------

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
