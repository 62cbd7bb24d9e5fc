"""What the model has seen so far, row by row: how many tokens, which positions are padding, which are images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.kernels import sent

Counts = np.ndarray  # int64, a number per row, or per row and set of heads; kept on the host


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


class Sequence:
    """The tokens of a batch of sequences.

    A position is a place in the batch as the model saw it, padding included; a token index counts a row's own tokens
    alone. Everything is known on the host but which positions are padding and images, which the device holds.

    Attributes:
        seen: positions so far, padding included; what transformers calls the sequence length.
        row_seen: tokens of each row so far, padding left out.
        valid: which of the first positions hold a token of the row, later ones do all; None while no row has padding.
        is_image: which of the first positions hold image tokens; None for text alone.
        seen_early: how many queries before its own saw the token of each of the first positions, where a model lets
            tokens see others after them; None if none did.
        rotary_offset: what the model adds to the number of a token that comes, to place it (M-RoPE); None if nothing.
        rotary_offsets: what it would be if the conversation ended after each of the first positions; None if nothing.
        scored: the last step that scored.
        decoded: for each run of decode steps, whose queries scored nothing, the token index of its first token and of
            the first after it, per row.
        went_into: for the layers after which a reducer acts, by number, the position that the token of each is part of
            from the next layer on: its own if it stays, -1 if it was dropped. Positions beyond the last stay.
    """

    def __init__(self) -> None:
        """Starts with nothing seen."""
        self.seen = 0
        self.row_seen: Counts = np.zeros(0, dtype=np.int64)
        self.valid: Bool[Tensor, "batch positions"] | None = None
        self.is_image: Bool[Tensor, "batch positions"] | None = None
        self.seen_early: Int[Tensor, "batch positions"] | None = None
        self.rotary_offset: Int[Tensor, "batch one"] | None = None
        self.rotary_offsets: Int[Tensor, "batch positions"] | None = None
        self.scored = Scored(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
        self.decoded: list[tuple[Counts, Counts]] = []
        self.went_into: dict[int, Int[Tensor, "batch positions"]] = {}
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

    @property
    def batch(self) -> int:
        """Number of rows; 0 before the first step."""
        return len(self.row_seen)

    @property
    def last_decoded(self) -> int:
        """Decode steps since the last step that scored."""
        if not self.decoded or (self.decoded[-1][1] != self.row_seen).any():
            return 0
        return int((self.row_seen - self.decoded[-1][0])[0])

    # -- what comes ----------------------------------------------------------------------------------------------------

    def extend(
        self, new_valid: Bool[Tensor, "batch positions"] | None, positions: int, row_new: Counts, scored: bool = True
    ) -> None:
        """Takes note of new positions.

        Args:
            new_valid: which of them hold a token; None if all do.
            positions: how many there are.
            row_new: tokens of each row among them.
            scored: whether their queries score; if not, this is a decode step.
        """
        if not self.batch:
            self.row_seen = np.zeros(len(row_new), dtype=np.int64)
            self.scored = Scored(*(np.zeros(len(row_new), dtype=np.int64) for _ in range(3)))
            self._scored_before = self.scored
        before = self.row_seen
        if new_valid is not None or (self.valid is not None and scored):
            device = new_valid.device if new_valid is not None else self.valid.device  # type: ignore[union-attr]
            if new_valid is None:
                new_valid = torch.ones(self.batch, positions, dtype=torch.bool, device=device)
            self.valid = torch.cat([self.known_valid(device), new_valid], dim=1)
        self.row_seen = before + row_new
        if scored:
            some = row_new > 0
            queries = np.where(some, row_new, self.scored.queries)
            self._unscored_before, self._scored_before = (self.scored.end, before), self.scored
            self.scored = Scored(self.row_seen, queries, np.where(some, before, self.scored.first))
        elif self.decoded and (self.decoded[-1][1] == before).all():
            self.decoded[-1] = (self.decoded[-1][0], self.row_seen)
        else:
            self.decoded.append((before, self.row_seen))
        self.seen += positions

    def score_again(self, queries: int) -> None:
        """Takes note that the queries of each row's last so many tokens, of decode steps, score after all."""
        first, count = self.row_seen - queries, np.full_like(self.row_seen, queries)
        self._unscored_before, self._scored_before = (self.scored.end, self.row_seen), self.scored
        self.scored = Scored(self.row_seen, count, first)
        start, _ = self.decoded.pop()
        if (start < first).any():
            self.decoded.append((start, first))

    def mark_images(self, is_image: Bool[Tensor, "batch positions"]) -> None:
        """Takes note of which of the positions about to come hold image tokens."""
        if self.is_image is None and not bool(is_image.any()):
            return
        earlier = is_image[:, :0] if self.is_image is None else self.is_image[:, : self.seen].to(is_image.device)
        self.is_image = torch.cat([F.pad(earlier, (0, self.seen - earlier.shape[1])), is_image], dim=1)

    def mark_offsets(self, offsets: Int[Tensor, "batch positions"]) -> None:
        """Takes note of the rotary offsets after each of the positions about to come; steps between had that before."""
        known = self.rotary_offsets
        known = (
            offsets.new_zeros(len(offsets), 1) if known is None or not self.seen else known[:, : self.seen].to(offsets)
        )
        between = known[:, -1:].expand(-1, max(0, self.seen - known.shape[1]))
        self.rotary_offsets = torch.cat([known[:, : self.seen], between, offsets], 1)

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

    def reduce(self, layers: int, went_into: Int[Tensor, "batch positions"]) -> None:
        """Takes note of what a reducer did to the positions seen, after so many layers."""
        earlier = self.went_into.get(layers)
        if earlier is not None:  # what earlier steps lost stays lost
            went_into = went_into.clone()
            went_into[:, : earlier.shape[1]] = earlier
        self.went_into[layers] = went_into

    # -- positions and token indices -----------------------------------------------------------------------------------

    def known_valid(self, device: torch.device) -> Tensor:
        """Which of all positions seen hold a token."""
        if self.valid is None:
            return torch.ones(self.batch, self.seen, dtype=torch.bool, device=device)
        return F.pad(self.valid, (0, self.seen - self.valid.shape[1]), value=True)

    def by_index(self, of_positions: Tensor, fill: bool | int = False) -> Tensor:
        """A tensor over positions, `[batch, positions]`, in the order of the rows' tokens, padding left out.

        Positions that it does not reach, and places beyond a row's tokens, are filled.
        """
        of_positions = F.pad(of_positions, (0, max(0, self.seen - of_positions.shape[1])), value=fill)[:, : self.seen]
        if self.valid is None:
            return of_positions
        valid = self.known_valid(of_positions.device)
        index = torch.where(valid, valid.cumsum(1) - 1, self.seen)
        target = torch.full((self.batch, self.seen + 1), fill, dtype=of_positions.dtype, device=of_positions.device)
        return target.scatter_(1, index, of_positions)[:, : self.seen]

    def positions_of(self, index: Int[Tensor, "batch sets slots"]) -> Int[Tensor, "batch sets slots"]:
        """Positions of tokens from their indices; -1 where the index is -1."""
        if self.valid is None:
            return index
        known = torch.arange(self.seen, device=index.device, dtype=index.dtype).expand(self.batch, -1)
        return taken(self.by_index(known, fill=-1), index, fill=-1)

    def index_of_positions(self, device: torch.device) -> Int[Tensor, "batch positions"]:
        """Token index of every position seen, -1 for padding."""
        if self.valid is None:
            return torch.arange(self.seen, device=device).expand(self.batch, -1)
        valid = self.known_valid(device)
        return torch.where(valid, valid.cumsum(1) - 1, -1)

    # -- what layers got -----------------------------------------------------------------------------------------------

    def missing(self, layer: int) -> Bool[Tensor, "batch positions"] | None:
        """Positions seen whose tokens a layer never got, since a reducer acted before it; None if it got all."""
        before = [layers for layers in self.went_into if layers <= layer]
        if not before:
            return None
        into = self.went_into[max(before)]
        gone = into != torch.arange(into.shape[1], device=into.device)
        return F.pad(gone, (0, self.seen - into.shape[1]))[:, : self.seen]

    def given(self, layer: int) -> Counts:
        """Tokens of each row that a layer got so far; waits for the device where a reducer acted."""
        missing = self.missing(layer)
        return self.row_seen if missing is None else self.row_seen - missing.sum(1).cpu().numpy()

    def images_given(self, layer: int) -> Counts:
        """Image tokens of each row that a layer got so far; waits for the device where there are images."""
        if self.is_image is None:
            return np.zeros(self.batch, dtype=np.int64)
        images, missing = self.is_image[:, : self.seen], self.missing(layer)
        if missing is not None:
            images = images & ~missing[:, : images.shape[1]].to(images.device)
        return images.sum(1).cpu().numpy()

    def first_given(self, layer: int, count: int) -> Counts:
        """How many of the first `count` tokens of each row a layer got; waits for the device where a reducer acted."""
        seen: Counts = np.minimum(self.row_seen, count)
        missing = self.missing(layer)
        if missing is not None and count:
            seen = seen - self.by_index(missing)[:, :count].sum(1).cpu().numpy()
        return seen

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

    def images_at(self, index: Int[Tensor, "batch sets slots"]) -> Tensor | None:
        """Which slots hold image tokens, from the indices of their tokens."""
        if self.is_image is None:
            return None
        images = self.by_index(self.is_image.to(index.device))
        return taken(images.repeat(index.shape[0] // images.shape[0], 1), index)

    def protected(self, index: Int[Tensor, "batch sets slots"], sinks: int, recents: int) -> Tensor:
        """Which slots hold one of a row's first `sinks` or last `recents` tokens."""
        latest: Tensor = index >= self._rows(self.row_seen - recents, index)
        return (index >= 0) & ((index < sinks) | latest)

    def _rows(self, counts: Counts, like: Tensor) -> Any:
        """Numbers per row, to be compared with indices, which may be of several layers, one after the other.

        A plain number where all rows have the same, which nobody has to copy to the device.
        """
        if (counts == counts[0]).all():
            return int(counts[0])
        counts = np.tile(counts, like.shape[0] // len(counts))
        return sent(counts, like.device, like.dtype)[:, None, None]

    # -- rows and rollback ---------------------------------------------------------------------------------------------

    def select_rows(self, index: Int[Tensor, " rows"], rows: Counts) -> None:
        """Reorders, repeats or drops rows.

        Args:
            index: rows to take, in order, on any device.
            rows: the same on the host.
        """
        self.row_seen = self.row_seen[rows]
        self.scored, self._scored_before = (
            Scored(*(counts[rows] if len(counts) else counts for counts in vars(scored).values()))
            for scored in (self.scored, self._scored_before)
        )
        first, end = (counts[rows] if len(counts) else counts for counts in self._unscored_before)
        self._unscored_before = first, end
        self.decoded = [(first[rows], end[rows]) for first, end in self.decoded]
        if self.valid is not None:
            self.valid = self.valid.index_select(0, index.to(self.valid.device))
        if self.is_image is not None:
            self.is_image = self.is_image.index_select(0, index.to(self.is_image.device))
        if self.seen_early is not None:
            self.seen_early = self.seen_early.index_select(0, index.to(self.seen_early.device))
        if self.rotary_offset is not None:
            self.rotary_offset = self.rotary_offset.index_select(0, index.to(self.rotary_offset.device))
        if self.rotary_offsets is not None:
            self.rotary_offsets = self.rotary_offsets.index_select(0, index.to(self.rotary_offsets.device))
        for layers, into in self.went_into.items():
            self.went_into[layers] = into.index_select(0, index.to(into.device))

    def scored_end(self, before_last_step: bool) -> Counts:
        """Tokens of each row that have a score, after the last step that scored or before it."""
        return (self._scored_before if before_last_step else self.scored).end

    def tokens_after(self, positions: int) -> Counts:
        """Tokens of each row that stand after so many positions; waits for the device if there is padding."""
        if self.valid is None or positions >= self.valid.shape[1]:
            return np.full(self.batch, self.seen - positions)
        return self.known_valid(self.valid.device)[:, positions:].sum(1).cpu().numpy()

    def crop(self, positions: int, gone: Counts, whole_step: bool = False) -> None:
        """Forgets all but so many first positions, and so many tokens of each row.

        Args:
            positions: positions that stay.
            gone: tokens of each row that go.
            whole_step: whether the last step that scored goes as a whole.
        """
        self.row_seen = left = self.row_seen - gone
        scored = self._scored_before if whole_step else self.scored
        queries = np.minimum(scored.queries, np.maximum(left - scored.first, 0))
        self.scored = Scored(np.minimum(scored.end, left), queries, scored.first)
        if self.valid is not None:
            self.valid = self.valid[:, :positions]
        if self.is_image is not None:
            self.is_image = self.is_image[:, :positions]
        if self.seen_early is not None:
            self.seen_early = self.seen_early[:, :positions]
        if self.rotary_offsets is not None and positions < self.rotary_offsets.shape[1]:
            self.rotary_offsets = self.rotary_offsets[:, :positions]
            self.rotary_offset = self.rotary_offsets[:, -1:]
        self.went_into = {layers: into[:, :positions] for layers, into in self.went_into.items()}
        self.decoded = [(first, np.minimum(end, left)) for first, end in self.decoded if (first < left).any()]
        self.seen = positions

    def hide(self, hidden: Bool[Tensor, "batch positions"]) -> Int[Tensor, "batch tokens"]:
        """Makes padding of tokens that were seen, since an attention mask hides them from now on.

        Waits for the device.

        Returns:
            For every token index before, the one after; -1 for tokens that are hidden now.
        """
        before = self.known_valid(hidden.device)
        kept = self.by_index(before & ~hidden)
        self.valid = before & ~hidden
        new_index = torch.where(kept, kept.cumsum(1) - 1, -1)
        until = F.pad(kept.cumsum(1), (1, 0)).cpu().numpy()
        rows = np.arange(self.batch)

        def left(counts: Counts) -> Counts:
            found: Counts = until[rows, np.clip(counts, 0, until.shape[1] - 1)]
            return found

        first, end = self.scored.first, self.scored.first + self.scored.queries
        self.scored = Scored(left(self.scored.end), np.maximum(left(end) - left(first), 1), left(first))
        self.decoded = [(left(first), left(end)) for first, end in self.decoded]
        self.row_seen = left(self.row_seen)
        return new_index


def taken(of_tokens: Tensor, index: Int[Tensor, "batch sets slots"], fill: bool | int = False) -> Tensor:
    """Entries of a tensor over token indices, `[batch, tokens]`, for the tokens in slots; filled for empty ones."""
    if not of_tokens.shape[1]:
        return torch.full(index.shape, fill, dtype=of_tokens.dtype, device=index.device)
    flat = index.flatten(1).clamp(min=0, max=of_tokens.shape[1] - 1).long()
    return of_tokens.gather(1, flat).view(index.shape).masked_fill(index < 0, fill)


def stacked(counts: list[Counts]) -> Counts:
    """Numbers of several layers, `[batch, sets]` each, together; as many sets as the layer that has most."""
    return np.stack(np.broadcast_arrays(*counts))


def without_last(tensor: Tensor, gone: Counts) -> Tensor:
    """All slots of each row but its last so many; in rows that lose more than others, padding comes before them.

    Args:
        tensor: what belongs to slots, `[batch, heads, slots, ...]`.
        gone: slots that each row loses.

    Returns:
        `[batch, heads, slots - least, ...]`; what is padding means nothing.
    """
    return _moved(tensor, tensor.shape[2] - int(gone.min()), gone.min() - gone)


def with_last(tensor: Tensor, gone: Counts) -> Tensor:
    """What belongs to slots that `without_last` left, each where its slot was before; without the least of the last."""
    return _moved(tensor, tensor.shape[2], gone - gone.min())


def _moved(tensor: Tensor, slots: int, by: Counts) -> Tensor:
    if not by.any():
        return tensor[:, :, :slots]
    place = sent(np.arange(slots) + by[:, None], tensor.device).clamp(0, tensor.shape[2] - 1)
    place = place.view(len(by), 1, slots, *[1] * (tensor.ndim - 3))
    return tensor.gather(2, place.expand(-1, tensor.shape[1], -1, *tensor.shape[3:]))
