"""How many tokens layers hold while a model decodes, as far as the host knows without asking the device."""

from __future__ import annotations

import numpy as np

from kvcompress.cache.allocation import Allocation, Rule
from kvcompress.cache.counts import Counts
from kvcompress.cache.sequence import Sequence


class SlotCounts:
    """What the host knows of a slot table: all of it as long as it runs every step, else bounds from what was seen.

    Attributes:
        extent: slots in use, `[layers, batch, sets]`; one set where all heads hold as many.
        hole: whether a slot is free, likewise.
        exact: whether what the host knows is exact; if not, `extent` is an upper bound.
        steps: steps that the table has advanced, or at least so many where the host does not run them.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        pinned: np.ndarray,
        packed: np.ndarray | None,
        row_seen: Counts,
        positions: int,
        allocation: Allocation | None,
        rule: Rule,
        by_age: bool,
        cut: tuple[Allocation, int] | None,
    ) -> None:
        """Starts after a prefill step; the arguments are those of `SlotTable`."""
        self.extent, self.hole = lengths.copy(), np.zeros(lengths.shape, dtype=bool)
        self.exact, self.steps = True, 0
        self._start, self._first_seen = (lengths, row_seen), positions
        self._allocation, self._rule, self._cut = allocation, rule, cut
        self._pinned_rows, self._by_age = pinned, by_age
        self._packed_rows = np.zeros_like(lengths) if packed is None else packed

    @property
    def evicts(self) -> bool:
        """Whether layers over their budget lose tokens."""
        return self._allocation is not None

    @property
    def positions_at_most(self) -> int:
        """Positions seen, or more where the host does not run the steps."""
        return self._first_seen + self.steps

    def count(self, row_seen: Counts, evicts: bool) -> None:
        """Advances what the host knows; `row_seen` counts this step's tokens."""
        self.steps += 1
        self.extent = np.where(self.hole, self.extent, self.extent + 1)
        if evicts and self._allocation is not None:
            over = self.extent + self._packed_rows > self._allocation.limits(self._rule, row_seen)
            self.hole = over & (self.extent > self._pinned_rows) if self._by_age else over
        else:
            self.hole = np.zeros_like(self.hole)

    def bound(self, steps: int) -> np.ndarray:
        """At most the slots in use while layers attend in so many steps more, `[layers, batch, sets]`."""
        held = self.held(steps - 1) + 1 if self._cut is None else self.held(steps)
        most: np.ndarray = np.maximum(held, self.extent)
        return most

    def decode_steps(self, sequence: Sequence) -> int:
        """Decode steps since the last forward of another kind, or at most so many where the host does not run them."""
        return sequence.last_decoded + self._first_seen + self.steps - sequence.seen

    def held(self, steps: int = 0) -> np.ndarray:
        """At most the tokens that layers and rows hold after so many steps more than now, `[layers, batch, sets]`."""
        if self.exact and not steps:
            held: np.ndarray = self.extent - self.hole
            return held
        lengths, row_seen = self._start
        taken = self.steps + steps
        held = lengths + taken
        if self._allocation is not None:  # what is freed after a step is no more than what came in it
            limits = self._allocation.limits(self._rule, row_seen + taken) - self._packed_rows
            limits = np.maximum(limits, self._pinned_rows) if self._by_age else limits
            held = np.minimum(held, np.maximum(lengths, limits))
        elif self._cut is not None:
            allocation, period = self._cut
            limits = allocation.limits(self._rule, row_seen + taken) + period - self._packed_rows
            held = np.minimum(held, np.maximum(lengths, limits))
        return held

    def select_counts(self, rows: Counts, allocation: Allocation | None) -> None:
        """Reorders, repeats or drops rows, whose budgets are those given."""
        self._allocation = allocation if self.evicts else None
        self._cut = None if self._cut is None or allocation is None else (allocation, self._cut[1])
        lengths, row_seen = self._start
        self._start = (lengths[:, rows], row_seen[rows])
        self.extent, self.hole, self._pinned_rows = self.extent[:, rows], self.hole[:, rows], self._pinned_rows[:, rows]
        self._packed_rows = self._packed_rows[:, rows]
