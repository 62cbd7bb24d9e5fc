"""What the model has seen so far, row by row: how many columns, which are padding, which are images."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


class Sequence:
    """The columns of a batch of sequences.

    Attributes:
        seen: columns so far, padding included; what transformers calls the sequence length.
        row_seen: tokens of each row so far, padding left out.
        valid: which columns hold a token of the row; None while no row has padding.
        is_image: which of the first columns hold image tokens; None for text alone.
        decoded: columns of decode steps, whose queries scored nothing, as ranges `[first, end)`.
        last_scored: tokens of each row in the last scoring forward that had any of it.
        went_into: for the layers after which a reducer acts, by number, the column that each column's token is part of
            from the next layer on: its own if it stays, -1 if it was dropped. Columns beyond the last stay.
    """

    def __init__(self) -> None:
        """Starts with nothing seen."""
        self.seen = 0
        self.row_seen: list[int] = []
        self.valid: Bool[Tensor, "batch columns"] | None = None
        self.is_image: Bool[Tensor, "batch columns"] | None = None
        self.decoded: list[tuple[int, int]] = []
        self.last_scored: list[int] = []
        self.went_into: dict[int, Int[Tensor, "batch columns"]] = {}
        self._last_from: list[int] = []  # first column of the forward that last_scored counts

    @property
    def batch(self) -> int:
        """Number of rows; 0 before the first forward."""
        return len(self.row_seen)

    @property
    def rows_alike(self) -> bool:
        """Whether every row has as many tokens."""
        return all(count == self.row_seen[0] for count in self.row_seen)

    def snapshot(self) -> Sequence:
        """The same columns, untouched by what happens to these; tensors are shared."""
        other = copy.copy(self)
        other.decoded, other.went_into = list(self.decoded), dict(self.went_into)
        return other

    def extend(
        self, batch: int, columns: int, new_valid: Bool[Tensor, "batch columns"] | None, scored: bool = True
    ) -> None:
        """Takes note of new columns.

        Args:
            batch: number of rows.
            columns: number of new columns.
            new_valid: which of them hold a token; None if all do.
            scored: whether their queries score; if not, this is a decode step, and all rows have a token.
        """
        if not self.row_seen:
            self.row_seen = self.last_scored = self._last_from = [0] * batch
        before = self.row_seen
        if new_valid is None and self.valid is None:
            self.row_seen = [count + columns for count in self.row_seen]
        else:
            device = new_valid.device if new_valid is not None else self.valid.device  # type: ignore[union-attr]
            if self.valid is None:
                self.valid = torch.ones(batch, self.seen, dtype=torch.bool, device=device)
            if new_valid is None:
                new_valid = torch.ones(batch, columns, dtype=torch.bool, device=device)
                self.row_seen = [count + columns for count in self.row_seen]
            else:
                added = new_valid.sum(1).tolist()
                self.row_seen = [count + more for count, more in zip(self.row_seen, added, strict=True)]
            self.valid = torch.cat([self.valid, new_valid], dim=1)
        if scored:
            new = [count - old for count, old in zip(self.row_seen, before, strict=True)]
            self.last_scored = [count or last for count, last in zip(new, self.last_scored, strict=True)]
            self._last_from = [self.seen if n else first for n, first in zip(new, self._last_from, strict=True)]
        elif self.decoded and self.decoded[-1][1] == self.seen:
            self.decoded[-1] = (self.decoded[-1][0], self.seen + columns)
        else:
            self.decoded.append((self.seen, self.seen + columns))
        self.seen += columns

    def hide(self, hidden: Bool[Tensor, "batch columns"]) -> None:
        """Takes tokens for padding from now on.

        Args:
            hidden: which of the columns seen.
        """
        valid = torch.ones_like(hidden) if self.valid is None else self.valid
        self.valid = valid & ~hidden.to(valid.device)
        self.row_seen = self.valid.sum(1).tolist()

    def mark_images(self, is_image: Bool[Tensor, "batch columns"]) -> None:
        """Takes note of which of the columns about to come hold image tokens."""
        if self.is_image is None:
            if not is_image.any():
                return
            self.is_image = torch.zeros(is_image.shape[0], self.seen, dtype=torch.bool, device=is_image.device)
        earlier = F.pad(self.is_image, (0, max(0, self.seen - self.is_image.shape[1])))[:, : self.seen]
        self.is_image = torch.cat([earlier, is_image.to(earlier.device)], dim=1)

    def index_of(self, columns: Int[Tensor, "batch sets slots"], rows: slice = slice(None)) -> Tensor:
        """Number of tokens of the row before each column; meaningless for empty slots."""
        if self.valid is None:
            return columns
        before = self.valid[rows].cumsum(1).to(columns.device) - 1
        flat = columns.clamp(min=0).long().flatten(1)
        return before.gather(1, flat).view(columns.shape)

    def reduce(self, layers: int, went_into: Int[Tensor, "batch columns"]) -> None:
        """Takes note of what a reducer did to the columns seen, after so many layers."""
        earlier = self.went_into.get(layers)
        if earlier is not None:  # what earlier forwards lost stays lost
            went_into = went_into.clone()
            went_into[:, : earlier.shape[1]] = earlier
        self.went_into[layers] = went_into

    def missing(self, layer: int) -> Bool[Tensor, "batch columns"] | None:
        """Columns seen whose tokens a layer never got, since a reducer acted before it; None if it got all."""
        before = [layers for layers in self.went_into if layers <= layer]
        if not before:
            return None
        into = self.went_into[max(before)]
        gone = into != torch.arange(into.shape[1], device=into.device)
        return F.pad(gone, (0, self.seen - into.shape[1]))

    def given(self, layer: int) -> list[int]:
        """Tokens of each row that a layer got so far."""
        missing = self.missing(layer)
        if missing is None:
            return list(self.row_seen)
        return [seen - gone for seen, gone in zip(self.row_seen, missing.sum(1).tolist(), strict=True)]

    def images_given(self, layer: int) -> list[int]:
        """Image tokens of each row that a layer got so far."""
        if self.is_image is None:
            return [0] * self.batch
        images, missing = (
            self.is_image[:, : self.seen],
            self.missing(layer),
        )  # a forward that failed may have marked more
        if missing is not None:
            images = images & ~missing[:, : images.shape[1]].to(images.device)
        return images.sum(1).tolist()

    def first_given(self, layer: int, count: int) -> list[int]:
        """How many of the first `count` tokens of each row a layer got."""
        seen, missing = [min(tokens, count) for tokens in self.row_seen], self.missing(layer)
        if missing is None or not count:
            return seen
        index = self.index_of(torch.arange(self.seen, device=missing.device).expand(self.batch, 1, -1)).squeeze(1)
        gone = (missing & (index < count)).sum(1).tolist()
        return [tokens - lost for tokens, lost in zip(seen, gone, strict=True)]

    def queries_on(self, columns: Int[Tensor, "batch sets slots"], last: bool, layer: int = 0) -> Tensor:
        """Number of queries that scored each column's token, at least 1.

        Args:
            columns: columns of the slots; the number is meaningless for empty ones.
            last: whether only the last scoring forward counts, since its scores replaced earlier ones.
            layer: index of the decoder layer; only where a reducer acts do layers differ.
        """
        ends = torch.tensor(self.row_seen, device=columns.device)[:, None, None]
        queries = ends - self.index_of(columns)
        if self.valid is None:
            for first, end in self.decoded:
                queries = queries - (end - columns.clamp(first, end))
        elif self.decoded:
            queries = queries - self._decoded_since(columns)
        scored, missing = torch.tensor(self.last_scored, device=columns.device)[:, None, None], self.missing(layer)
        if missing is not None:
            missing = missing.to(columns.device)
            until = F.pad(missing.cumsum(1), (1, 0))  # missing columns before each one, and all of them
            rows = torch.arange(self.batch, device=columns.device)
            before = until[rows[:, None], columns.clamp(min=0).long().flatten(1)].view(columns.shape)
            queries = queries - (until[:, -1, None, None] - before)
            start = torch.tensor(self._last_from, device=columns.device).clamp(max=self.seen)
            scored = scored - (until[:, -1] - until[rows, start])[:, None, None]
        return (queries.minimum(scored) if last else queries).clamp(min=1)

    def _decoded_since(self, columns: Int[Tensor, "batch sets slots"]) -> Tensor:
        """Tokens of decode steps at each column or later, without those that a mask hid."""
        assert self.valid is not None
        decoded = torch.zeros_like(self.valid)
        for first, end in self.decoded:
            decoded[:, first:end] = self.valid[:, first:end]
        until = F.pad(decoded.to(columns.device).cumsum(1), (1, 0))  # before each column, and all of them
        before = until.gather(1, columns.clamp(min=0).long().flatten(1)).view(columns.shape)
        return until[:, -1, None, None] - before

    def scored_within(self, first: int, end: int) -> int:
        """Columns in a range whose queries scored."""
        return max(0, end - first) - sum(max(0, min(end, e) - max(first, f)) for f, e in self.decoded)

    def take_back_last(self, before: tuple[list[int], list[int]], first: int) -> list[int]:
        """Counts anew what is left, after a crop, of the last scoring forward, which began at column `first`.

        Args:
            before: `last_scored` and their first columns, as they were before that forward.
            first: its first column.

        Returns:
            Tokens of it that are left, per row.
        """
        left = max(0, self.seen - first)
        counts = [left] * self.batch if self.valid is None else self.valid[:, first:].sum(1).tolist()
        nothing = [0] * self.batch  # before the first forward
        scored, starts = before[0] or nothing, before[1] or nothing
        self.last_scored = [count or last for count, last in zip(counts, scored, strict=True)]
        self._last_from = [first if count else start for count, start in zip(counts, starts, strict=True)]
        return counts

    @property
    def last(self) -> tuple[list[int], list[int]]:
        """Tokens of each row in its last scoring forward, and the first columns of these."""
        return self.last_scored, self._last_from

    def images_at(self, columns: Int[Tensor, "batch sets slots"], rows: slice = slice(None)) -> Tensor | None:
        """Which slots hold image tokens, from the columns of their tokens."""
        if self.is_image is None:
            return None
        known = self.is_image[rows].to(columns.device)
        flat = columns.clamp(min=0).long().flatten(1)
        known = F.pad(known, (0, max(0, self.seen - known.shape[1])))
        return known.gather(1, flat).view(columns.shape) & (columns >= 0)

    def protected(self, columns: Int[Tensor, "batch sets slots"], sinks: int, recents: int) -> Tensor:
        """Which slots hold one of a row's first `sinks` or last `recents` tokens."""
        index = self.index_of(columns)
        ends = torch.tensor(self.row_seen, device=columns.device)[:, None, None]
        return (columns >= 0) & ((index < sinks) | (index >= ends - recents))

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Reorders, repeats or drops rows."""
        alike = self.rows_alike and len(set(self.last_scored)) == len(set(self._last_from)) == 1
        if not alike or len(index) != self.batch:
            rows = index.tolist()
            self.row_seen = [self.row_seen[row] for row in rows]
            self.last_scored = [self.last_scored[row] for row in rows]
            self._last_from = [self._last_from[row] for row in rows]
        if self.valid is not None:
            self.valid = self.valid.index_select(0, index.to(self.valid.device))
        if self.is_image is not None:
            self.is_image = self.is_image.index_select(0, index.to(self.is_image.device))
        for layers, into in self.went_into.items():
            self.went_into[layers] = into.index_select(0, index.to(into.device))

    def crop(self, columns: int) -> None:
        """Forgets all but the first `columns` columns."""
        removed = self.seen - columns
        if self.valid is not None:
            self.valid = self.valid[:, :columns]
            self.row_seen = self.valid.sum(1).tolist()
        else:
            self.row_seen = [count - removed for count in self.row_seen]
        if self.is_image is not None:
            self.is_image = self.is_image[:, :columns]
        self.went_into = {layers: into[:, :columns] for layers, into in self.went_into.items()}
        self.decoded = [(first, min(end, columns)) for first, end in self.decoded if first < columns]
        self.seen = columns
