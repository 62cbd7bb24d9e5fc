"""What the model has seen so far, and whose queries scored it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.positions import Positions, taken
from kvcompress.kernels import sent


@dataclass
class Scored:
    """The last step that scored.

    Attributes:
        end: tokens of each row that have a score: those seen by then.
        queries: tokens of each row in the last such step that had any of it.
        first: token index of the first of them.
    """

    end: Counts
    queries: Counts
    first: Counts


class Sequence(Positions):
    """The tokens of a batch of sequences, and the steps that scored them.

    Attributes:
        seen_early: how many queries before its own saw the token of each of the first positions, where a model lets
            tokens see others after them; None if none did.
        scored: the last step that scored.
        decoded: for each run of decode steps, whose queries scored nothing, the token index of its first token and of
            the first after it, per row.
    """

    _of_rows = (*Positions._of_rows, "seen_early")
    _of_positions = (*Positions._of_positions, "seen_early")

    def __init__(self) -> None:
        """Starts with nothing seen."""
        super().__init__()
        self.seen_early: Int[Tensor, "batch positions"] | None = None
        self.scored = Scored(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
        self.decoded: list[tuple[Counts, Counts]] = []
        # Before the last step that scored: the step before it, and the tokens that had no score.
        self._scored_before = self.scored
        self._unscored_before = (self.scored.end, self.scored.end)

    def saved(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere."""
        return dict(vars(self))

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave."""
        new = dict.fromkeys(("rotary_offset", "rotary_offsets", "seen_early"))
        saved = {**new, **saved}  # older releases knew no such models
        self.__dict__.update({name: saved[name] for name in vars(self)})

    # -- what comes ----------------------------------------------------------------------------------------------------

    def extend(
        self, new_valid: Bool[Tensor, "batch positions"] | None, positions: int, row_new: Counts, scored: bool = True
    ) -> None:
        """Takes note of new positions, and of whether their queries score; see `Positions.extend`."""
        if not self.batch:
            self.scored = Scored(*(np.zeros(len(row_new), dtype=np.int64) for _ in range(3)))
            self._scored_before = self.scored
        super().extend(new_valid, positions, row_new, scored)
        before = self.row_seen - row_new
        if scored:
            some = row_new > 0
            queries = np.where(some, row_new, self.scored.queries)
            self._unscored_before, self._scored_before = (self.scored.end, before), self.scored
            end = np.where(some, self.row_seen, self.scored.end)
            self.scored = Scored(end, queries, np.where(some, before, self.scored.first))
        elif self.decoded and (self.decoded[-1][1] == before).all():
            self.decoded[-1] = (self.decoded[-1][0], self.row_seen)
        else:
            self.decoded.append((before, self.row_seen))

    def score_again(self, queries: int) -> None:
        """Takes note that the queries of each row's last so many tokens, of decode steps, score after all."""
        first, count = self.row_seen - queries, np.full_like(self.row_seen, queries)
        self._unscored_before, self._scored_before = (self.scored.end, self.row_seen), self.scored
        self.scored = Scored(self.row_seen, count, first)
        start, _ = self.decoded.pop()
        if (start < first).any():
            self.decoded.append((start, first))

    def mark_seen_early(
        self, last_seen: Int[Tensor, "batch positions"], new_valid: Bool[Tensor, "batch positions"] | None
    ) -> None:
        """Takes note of how many queries see the tokens of the positions that just came before their own does.

        Args:
            last_seen: number of the last of these positions that each of them sees.
            new_valid: which of them hold a token; None if all do.
        """
        asks = torch.ones_like(last_seen) if new_valid is None else new_valid.to(last_seen)
        change = F.pad(asks, (1, 1)).scatter_add(1, last_seen + 1, -asks)
        early, first = change.cumsum(1)[:, :-2], self.seen - last_seen.shape[1]
        earlier = early[:, :0] if self.seen_early is None else self.seen_early[:, :first].to(early.device)
        self.seen_early = torch.cat([F.pad(earlier, (0, first - earlier.shape[1])), early], dim=1)

    @property
    def last_decoded(self) -> int:
        """Decode steps since the last step that scored."""
        if not self.decoded or (self.decoded[-1][1] != self.row_seen).any():
            return 0
        return int((self.row_seen - self.decoded[-1][0])[0])

    # -- what slots hold, by the index of their tokens -----------------------------------------------------------------

    def queries_on(self, index: Int[Tensor, "batch sets slots"], last: bool, layer: int = 0) -> Tensor:
        """Number of queries that scored each token, at least 1.

        Args:
            index: token indices; the number is meaningless for empty slots.
            last: whether only the last scoring step counts, since its scores replaced earlier ones.
            layer: index of the decoder layer; only where a reducer acts do layers differ.
        """
        queries: Tensor = self._rows(self.row_seen, index) - index
        early: Tensor | int = 0
        if self.seen_early is not None:
            of_tokens = self.by_index(self.seen_early.to(index.device))
            early = taken(of_tokens.repeat(index.shape[0] // of_tokens.shape[0], 1), index)
            queries = queries + early
        for run in self.decoded:
            first, end = (self._rows(counts, index) for counts in run)
            queries = queries - (end - index.clamp(min=first).clamp(max=end))  # each a number, or one per row
        scored, missing = self._rows(self.scored.queries, index), self.missing(layer)
        if missing is not None:
            until = F.pad(self.by_index(missing.to(index.device)).cumsum(1), (1, 0))  # missing before each, and all
            whole = until[:, -1:, None]
            queries = queries - (whole - taken(until, index - early))
            since = sent(self.scored.first, index.device, index.dtype)[:, None, None]
            scored = scored - (whole - taken(until, since))
        if not last:
            return queries.clamp(min=1)
        return queries.clamp(1, max(1, scored)) if isinstance(scored, int) else queries.minimum(scored).clamp(min=1)

    def unscored(self, index: Int[Tensor, "batch sets slots"]) -> Bool[Tensor, "batch sets slots"]:
        """Which tokens came after the last step that scored."""
        unscored: Tensor = index >= self._rows(self.scored.end, index)
        return unscored

    def unscored_before(self, index: Int[Tensor, "batch sets slots"]) -> Bool[Tensor, "batch sets slots"] | None:
        """Which tokens had no score when the step in progress, which scores, began; None if all older ones had."""
        first, end = self._unscored_before
        return None if (first == end).all() else index >= self._rows(first, index)

    # -- rows and rollback ---------------------------------------------------------------------------------------------

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows; see `Positions.select_rows`."""
        super().select_rows(index, rows)
        self.scored, self._scored_before = (
            Scored(*(counts[rows] if len(counts) else counts for counts in vars(scored).values()))
            for scored in (self.scored, self._scored_before)
        )
        first, end = (counts[rows] if len(counts) else counts for counts in self._unscored_before)
        self._unscored_before = first, end
        self.decoded = [(first[rows], end[rows]) for first, end in self.decoded]

    def scored_end(self, before_last_step: bool) -> Counts:
        """Tokens of each row that have a score, after the last step that scored or before it."""
        return (self._scored_before if before_last_step else self.scored).end

    def crop(self, positions: int, gone: Counts, whole_step: bool = False) -> None:
        """Forgets all but so many first positions, and so many tokens of each row.

        Args:
            positions: positions that stay.
            gone: tokens of each row that go.
            whole_step: whether the last step that scored goes as a whole.
        """
        super().crop(positions, gone)
        left, scored = self.row_seen, self._scored_before if whole_step else self.scored
        queries = np.minimum(scored.queries, np.maximum(left - scored.first, 0))
        self.scored = Scored(np.minimum(scored.end, left), queries, scored.first)
        self.decoded = [(first, np.minimum(end, left)) for first, end in self.decoded if (first < left).any()]

    def hide(self, hidden: Bool[Tensor, "batch positions"]) -> Int[Tensor, "batch tokens"]:
        """Makes padding of tokens that were seen, since an attention mask hides them from now on.

        Waits for the device.

        Returns:
            For every token index before, the one after; -1 for tokens that are hidden now.
        """
        new_index, left = self._hide(hidden)
        first, end = self.scored.first, self.scored.first + self.scored.queries
        self.scored = Scored(left(self.scored.end), np.maximum(left(end) - left(first), 1), left(first))
        self.decoded = [(left(first), left(end)) for first, end in self.decoded]
        return new_index
