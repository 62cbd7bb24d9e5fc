"""Plain and slow statements of what the package promises, written from the definitions alone."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvcompress import CompressionConfig

# -- allocation: one row, masses as exact numbers ----------------------------------------------------------------------


def mass_before(masses: Sequence[float], capacity: int) -> list[Fraction]:
    """Share of a layer's mass that ranks before each rank; with no mass at all, every rank counts the same."""
    ranked = sorted((Fraction(mass) for mass in masses), reverse=True)
    whole = sum(ranked)
    if not whole:
        return [Fraction(rank, max(capacity, 1)) for rank in range(len(ranked) + 1)]
    return [Fraction(0), *(part / whole for part in itertools.accumulate(ranked))]


def prefix_bounds(
    total: int, floor: Sequence[int], capacity: Sequence[int], protected: str = "floor", even: float = 0.0
) -> tuple[list[int], list[int]]:
    """What each layer gets before the threshold gives out the rest, and the first rank that is then given."""
    least = uniform_budgets(math.floor(even * max(sum(floor), min(total, sum(capacity)))), floor, capacity)
    return least, list(floor) if protected == "floor" else [0] * len(floor)


def prefix_budgets(
    masses: Sequence[Sequence[float]],
    total: int,
    floor: Sequence[int],
    capacity: Sequence[int],
    protected: str = "floor",
    even: float = 0.0,
) -> list[int]:
    """Floors and the even share first, then the ranks with the smallest mass before them, ties by layer, then rank.

    The floor stands for a layer's first ranks, or comes on top of them.
    """
    before = [mass_before(layer, most) for layer, most in zip(masses, capacity, strict=True)]
    least, begin = prefix_bounds(total, floor, capacity, protected, even)
    loose = sorted(
        (before[layer][rank], layer, rank)
        for layer in range(len(masses))
        for rank in range(begin[layer], begin[layer] + capacity[layer] - least[layer])
    )
    budget = list(least)
    for _, layer, _ in loose[: max(0, total - sum(least))]:
        budget[layer] += 1
    return budget


def uniform_budgets(total: int, floor: Sequence[int], capacity: Sequence[int]) -> list[int]:
    """From the floors up, one slot at a time to the layer that has fewest."""
    budget = list(floor)
    while sum(budget) < min(total, sum(capacity)):
        room = [layer for layer in range(len(budget)) if budget[layer] < capacity[layer]]
        budget[min(room, key=lambda layer: budget[layer])] += 1
    return budget


def feasible(total: int, floor: Sequence[int], capacity: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every allocation that meets floors, capacities and the total as far as they let it."""
    target = max(sum(floor), min(total, sum(capacity)))
    for budget in itertools.product(*(range(low, high + 1) for low, high in zip(floor, capacity, strict=True))):
        if sum(budget) == target:
            yield budget


def smallest_retained(
    masses: Sequence[Sequence[float]], budget: Sequence[int], floor: Sequence[int], capacity: Sequence[int]
) -> Fraction:
    """The smallest share of its mass that any layer retains in what it keeps beyond `floor`; a full one retains all."""
    before = [mass_before(layer, most) for layer, most in zip(masses, capacity, strict=True)]
    layers = zip(before, budget, floor, capacity, strict=True)
    return min(layer[kept if kept == most else kept - least] for layer, kept, least, most in layers)


# -- a cache as plain lists --------------------------------------------------------------------------------------------


@dataclass
class PlainLayer:
    """What one layer holds for one row: per set, its positions in order."""

    held: list[list[int]]
    scored: set[int] = field(default_factory=set)  # positions that have a score
    budget: int = 0  # of the last allocation
    pinned: int = 0  # the slots before this index never leave by age


class PlainRow:
    """One row of a compressed cache: which of its positions every layer holds, by the rules as they are written down.

    Importance must come from `score(layer, head, index)`, anew for all held tokens at every scoring forward, where
    index counts the tokens of the row; all values that one layer takes must be distinct enough for float arithmetic.
    """

    def __init__(
        self, config: CompressionConfig, layers: int, heads: int, score: Callable[[int, int, int], int]
    ) -> None:
        """Starts with nothing seen."""
        self.config, self.heads, self.score = config, heads, score
        self.valid: list[bool] = []
        self.spent = 0
        self.scored_end = self.scored_before = 0  # tokens seen by the last forward that scored, and by the one before
        self.waiting: str | None = None
        self.by_head = getattr(config.evictor, "granularity", "layer") == "head"
        sets = heads if self.by_head else 1
        self.layers = [PlainLayer([[] for _ in range(sets)]) for _ in range(layers)]

    # -- what the rules speak of ---------------------------------------------------------------------------------------

    @property
    def positions(self) -> list[int]:
        """Positions that hold a token of the row."""
        return [position for position, is_token in enumerate(self.valid) if is_token]

    @property
    def seen(self) -> int:
        """Tokens of the row."""
        return sum(self.valid)

    def sinks(self) -> set[int]:
        """The first tokens."""
        return set(self.positions[: self.config.budget.sink])

    def recents(self) -> set[int]:
        """The last tokens."""
        recent = max(self.config.budget.recent, self.config.scorer.protects if self.config.scorer else 0)
        return set(self.positions[max(0, self.seen - recent) :])

    def total(self) -> int:
        """Slots that all layers may hold together."""
        budget = self.config.budget
        if budget.tokens is not None:
            return budget.tokens * len(self.layers)
        return int(Fraction(budget.fraction) * self.seen * len(self.layers))

    def importance(self, layer: int, head: int | None, position: int) -> Fraction:
        """Score of a token; of all heads together for head None."""
        index = self.positions.index(position)
        heads = range(self.heads) if head is None else [head]
        return Fraction(sum(self.score(layer, h, index) for h in heads), len(heads))

    # -- forwards ------------------------------------------------------------------------------------------------------

    def forward(self, new_valid: Sequence[bool], recording: bool) -> None:
        """Takes new positions, and evicts unless past recording makes that wait."""
        scores = not self.valid or len(new_valid) > 1
        first = len(self.valid)
        self.valid += new_valid
        for layer in self.layers:
            for positions in layer.held:
                positions += [first + offset for offset, is_token in enumerate(new_valid) if is_token]
            if scores:
                layer.scored = set(itertools.chain(*layer.held))
        self.waiting = "scored" if scores else "decoded"
        if scores:
            self.scored_before, self.scored_end, self.step = self.scored_end, self.seen, len(new_valid)
        if not recording:
            self.settle()

    def settle(self) -> None:
        """Does what the last forward left to do."""
        waiting, self.waiting = self.waiting, None
        if self.config.evictor is None:
            return
        if waiting == "scored":
            self.compress()
        elif self.config.evictor.cuts_every is not None:
            self.cut()
        elif waiting == "decoded" and getattr(self.config.evictor, "decode", None) != "none":
            for index in range(len(self.layers)):
                self.evict(index)

    def compress(self) -> None:
        """Allocates and selects."""
        capacity = [len(layer.held[0]) for layer in self.layers]
        floor = [min(len(self.sinks() | self.recents()), most) for most in capacity]
        if self.config.allocator.name == "prefix":
            masses = [
                [self.importance(index, None, position) for position in layer.held[0]]
                for index, layer in enumerate(self.layers)
            ]
            allocator = self.config.allocator
            budgets = prefix_budgets(masses, self.total(), floor, capacity, allocator.protected, allocator.even)
        else:
            budgets = uniform_budgets(self.total(), floor, capacity)
        self.spent = sum(budgets)
        for index, (layer, budget) in enumerate(zip(self.layers, budgets, strict=True)):
            layer.budget = budget
            self.select(index, budget)

    def cut(self) -> None:
        """Selects anew once a period of tokens has come since the last time."""
        if self.seen - self.scored_end >= self.config.evictor.cuts_every:
            self.scored_end = self.seen
            for index, layer in enumerate(self.layers):
                self.select(index, min(self.limit(index), len(layer.held[0])))

    def select(self, index: int, budget: int) -> None:
        """Keeps the protected, then the highest scores (or the latest), ties to earlier tokens."""
        layer, evictor = self.layers[index], self.config.evictor
        kept = []
        for head, positions in enumerate(layer.held):
            protected = self.sinks() | self.recents()

            def rank(position: int, head: int = head, protected: set[int] = protected) -> Any:
                if position in protected:
                    return (0, 0)
                if evictor.name == "streaming":
                    return (1, -position)
                return (1, -self.importance(index, head if self.by_head else None, position))

            kept.append(sorted(sorted(positions, key=rank)[:budget]))
        layer.held = kept
        layer.pinned = max(self.config.budget.sink, self.fixed_point(budget))

    def fixed_point(self, kept: int) -> int:
        """The index `distance` slots before the end, or the middle where fewer are kept."""
        if getattr(self.config.evictor, "decode", None) != "fixed_point":
            return 0
        distance = self.config.evictor.distance or max(25, len(self.recents()))
        return kept - distance if kept > distance else min(kept // 2, max(0, kept - len(self.recents())))

    def limit(self, index: int) -> int:
        """A layer's share of what the budget gives for the tokens seen by now, but never less than the protected."""
        share = Fraction(self.layers[index].budget, self.spent) if self.spent else Fraction(1, len(self.layers))
        return max(int(share * self.total()), len(self.sinks() | self.recents()))

    def evict(self, index: int) -> None:
        """Frees slots by the decode rule until the layer is within its limit."""
        layer = self.layers[index]
        for head, positions in enumerate(layer.held):
            while len(positions) > self.limit(index):
                positions.remove(self.victim(index, head, positions))

    def victim(self, index: int, head: int, positions: list[int]) -> int:
        """The oldest slot that is not pinned; or the unprotected one of the lowest score, while any of them has one."""
        layer, protected = self.layers[index], self.sinks() | self.recents()
        loose = [position for position in positions if position not in protected]
        if getattr(self.config.evictor, "decode", None) == "lowest_score":
            scored = [position for position in loose if position in layer.scored]
            own = head if self.by_head else None
            return min(scored, key=lambda c: (self.importance(index, own, c), c)) if scored else loose[0]
        return positions[layer.pinned] if len(positions) > layer.pinned else loose[0]

    def copy(self) -> PlainRow:
        """A row that goes on independently."""
        other = copy.copy(self)
        other.valid, other.layers = list(self.valid), copy.deepcopy(self.layers)
        return other

    # -- going back ----------------------------------------------------------------------------------------------------

    def can_crop(self, removed: int) -> bool:
        """Whether every layer still holds all of the last positions."""
        length = len(self.valid) - removed
        gone = {position for position in self.positions if position >= length}
        return all(gone <= set(positions) for layer in self.layers for positions in layer.held)

    def crop(self, removed: int) -> None:
        """Takes the last positions back, then lets what waited happen."""
        length = len(self.valid) - removed
        self.valid = self.valid[:length]
        if self.waiting == "scored" and removed >= self.step:
            self.scored_end = self.scored_before
        self.scored_end = min(self.scored_end, self.seen)
        for layer in self.layers:
            layer.held = [[position for position in positions if position < length] for positions in layer.held]
            layer.scored = {position for position in layer.scored if position < length}
        self.settle()
