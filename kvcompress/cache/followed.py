"""Tokens of a forward that a reducer leaves, followed from reduction to reduction on the host."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from kvcompress.policies.images import TokenFacts

Numbers: TypeAlias = Int[np.ndarray, "batch tokens"]


class Followed:
    """Where tokens that go on were in the forward, and what its other positions are part of.

    Rows that lose different numbers of tokens are padded on the left, so that every row ends with its last token.

    Attributes:
        facts: what is known of the tokens that go on.
        positions: which of the forward's positions each of them has; of padding, one that is padding or lost.
        last_seen: number of the last of these tokens that each of them sees; None if it is its own.
        into: for each of the forward's positions the one that its token is part of, -1 if it was dropped; padding is
            its own.
    """

    def __init__(
        self, facts: Int[np.ndarray, "batch tokens facts"], home: Numbers | None, last_seen: Numbers | None
    ) -> None:
        """Starts with all tokens.

        Args:
            facts: the numbers of `TokenFacts`; the last token counts as text, and none but image tokens has a grid.
            home: for each position, the one that the model has its token in; None if it is the same.
            last_seen: number of the last position that each sees; None if it is its own.
        """
        facts = facts.copy()
        facts[:, -1, 1] = 0  # it stays: what comes next is read from its state
        facts[..., 2][facts[..., 1] == 0] = -1
        facts[facts[..., 0] < 0] = -1
        self.facts: TokenFacts[np.ndarray] = TokenFacts(facts)
        self.positions: Numbers = np.arange(facts.shape[1])[None].repeat(len(facts), 0)
        self.last_seen = last_seen
        self.into = self._every = self.positions
        self._home = home
        self._first = (~self.valid).sum(1, keepdims=True)  # position of each row's first token

    @property
    def valid(self) -> Bool[np.ndarray, "batch tokens"]:
        """Which are no padding."""
        valid: np.ndarray = self.facts.index >= 0
        return valid

    def own(self) -> Numbers:
        """The number of each token."""
        return self._every[:, : self.positions.shape[1]]

    def images(self) -> Int[np.ndarray, "batch images"]:
        """Numbers of each row's image tokens, the last again in rows that have fewer; any in rows that have none."""
        is_image = self.facts.is_image
        counts, order = is_image.sum(1, keepdims=True), (~is_image).argsort(axis=1, kind="stable")
        return taken(order, np.minimum(np.arange(max(1, counts.max())), np.maximum(counts - 1, 0)))

    def go_on(self, into: Numbers, stays: Bool[np.ndarray, "batch tokens"]) -> Int[np.ndarray, "batch fewer"]:
        """Leaves the tokens that stay.

        Args:
            into: number of the token that each is part of from now on, -1 for none; of padding it means nothing.
            stays: which are tokens that are their own.

        Returns:
            The numbers, among those before, of the tokens that go on, and of others in their padding.
        """
        self.into = self._followed(into)
        most = int(stays.sum(1).max())
        last = stays.argsort(axis=1, kind="stable")[:, stays.shape[1] - most :]
        if self.last_seen is not None:
            until = stays.cumsum(1)
            seen = most - until[:, -1:] + taken(until, self.last_seen) - 1
            self.last_seen = np.maximum(taken(seen, last), np.arange(most))
        self.positions = taken(self.positions, last)
        facts = np.take_along_axis(self.facts.numbers, last[..., None], 1)
        facts[~taken(stays, last)] = -1
        self.facts = TokenFacts(facts)
        return last

    def _followed(self, into: Numbers) -> Int[np.ndarray, "batch positions"]:
        """For each of the forward's positions the one that it is part of now."""
        target = np.where(into < 0, -1, taken(self.positions, into.clip(0, into.shape[1] - 1)))
        moved = self._every.copy()
        np.put_along_axis(moved, self.positions, np.where(self.valid, target, self.positions), 1)
        return np.where(self.into < 0, -1, taken(moved, self.into.clip(0)))

    def in_model(self) -> Numbers:
        """Which of the model's positions each token has."""
        return self._at_home(self.positions)

    def first_in_model(self) -> Numbers:
        """Which of the model's positions each token would have, were they the row's first."""
        number = np.arange(self.positions.shape[1]) - (~self.valid).sum(1, keepdims=True)
        return self._at_home((self._first + number).clip(0))

    def _at_home(self, positions: Numbers) -> Numbers:
        return positions if self._home is None else taken(self._home, positions)


def taken(array: np.ndarray, positions: Int[np.ndarray, "batch fewer"]) -> np.ndarray:
    """Some positions of each row."""
    return np.take_along_axis(array, positions, 1)


def through_rows(positions: Numbers, width: int) -> Numbers:
    """Where positions of rows of some width are once rows follow each other."""
    return positions + width * np.arange(len(positions))[:, None]
