"""What the model has seen so far, row by row: how many tokens, which positions are padding, which are images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.kernels import sent


class Positions:
    """The positions of a batch of sequences.

    A position is a place in the batch as the model saw it, padding included; a token index counts a row's own tokens
    alone. Everything is known on the host but which positions are padding and images, which the device holds.

    Attributes:
        seen: positions so far, padding included; what transformers calls the sequence length.
        row_seen: tokens of each row so far, padding left out.
        valid: which of the first positions hold a token of the row, later ones do all; None while no row has padding.
        is_image: which of the first positions hold image tokens; None for text alone.
        rotary_offset: what the model adds to the number of a token that comes, to place it (M-RoPE); None if nothing.
        rotary_offsets: what it would be if the conversation ended after each of the first positions; None if nothing.
        went_into: for the layers after which a reducer acts, by number, the position that the token of each is part of
            from the next layer on: its own if it stays, -1 if it was dropped. Positions beyond the last stay.
    """

    _of_rows: tuple[str, ...] = ("valid", "is_image", "rotary_offset", "rotary_offsets")  # tensors of rows, or None
    _of_positions: tuple[str, ...] = ("valid", "is_image")  # of those, what first positions alone have

    def __init__(self) -> None:
        """Starts with nothing seen."""
        self.seen = 0
        self.row_seen: Counts = np.zeros(0, dtype=np.int64)
        self.valid: Bool[Tensor, "batch positions"] | None = None
        self.is_image: Bool[Tensor, "batch positions"] | None = None
        self.rotary_offset: Int[Tensor, "batch one"] | None = None
        self.rotary_offsets: Int[Tensor, "batch positions"] | None = None
        self.went_into: dict[int, Int[Tensor, "batch positions"]] = {}

    @property
    def batch(self) -> int:
        """Number of rows; 0 before the first step."""
        return len(self.row_seen)

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
        if new_valid is not None or (self.valid is not None and scored):
            device = new_valid.device if new_valid is not None else self.valid.device  # type: ignore[union-attr]
            if new_valid is None:
                new_valid = torch.ones(self.batch, positions, dtype=torch.bool, device=device)
            self.valid = torch.cat([self.known_valid(device), new_valid], dim=1)
        self.row_seen = self.row_seen + row_new
        self.seen += positions

    def mark_images(self, is_image: Bool[Tensor, "batch positions"]) -> None:
        """Takes note of which of the positions about to come hold image tokens."""
        if self.is_image is None and not bool(is_image.any()):
            return
        earlier = is_image[:, :0] if self.is_image is None else self.is_image[:, : self.seen].to(is_image.device)
        self.is_image = torch.cat([F.pad(earlier, (0, self.seen - earlier.shape[1])), is_image], dim=1)

    def mark_offsets(self, offsets: Int[Tensor, "batch positions"]) -> None:
        """Takes note of the rotary offsets after each of the positions about to come; steps between had that before."""
        if self.rotary_offsets is None or not self.seen:
            known = offsets.new_zeros(len(offsets), 1)
        else:
            known = self.rotary_offsets[:, : self.seen].to(offsets)
        between = known[:, -1:].expand(-1, max(0, self.seen - known.shape[1]))
        self.rotary_offsets = torch.cat([known[:, : self.seen], between, offsets], 1)

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
        of_positions = of_positions[:, : self.seen]
        if of_positions.shape[1] < self.seen:
            of_positions = F.pad(of_positions, (0, self.seen - of_positions.shape[1]), value=fill)
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

    def stage_of(self, layer: int) -> int | None:
        """Number of the last layer before which a reducer acted, as far as one layer; None if none did."""
        return max((before for before in self.went_into if before <= layer), default=None)

    def missing(self, layer: int) -> Bool[Tensor, "batch positions"] | None:
        """Positions seen whose tokens a layer never got, since a reducer acted before it; None if it got all."""
        stage = self.stage_of(layer)
        if stage is None:
            return None
        into = self.went_into[stage]
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

    def first_given(self, layers: list[int], count: int) -> Counts:
        """How many of the first `count` tokens of each row layers got, `[layers, batch]`.

        Waits for the device once where a reducer acted.
        """
        seen: Counts = np.minimum(self.row_seen, count)
        stages = [self.stage_of(layer) for layer in layers]
        missing = {stage: self.missing(stage) for stage in dict.fromkeys(stages) if stage is not None}
        if not missing or not count:
            return np.tile(seen, (len(layers), 1))
        device = next(gone.device for gone in missing.values() if gone is not None)
        lost = [self.by_index(gone.to(device))[:, :count].sum(1) for gone in missing.values() if gone is not None]
        of_stages = dict(zip(missing, torch.stack(lost).cpu().numpy(), strict=True))
        return np.stack([seen if stage is None else seen - of_stages[stage] for stage in stages])

    # -- what slots hold, by the index of their tokens -----------------------------------------------------------------

    def images_at(self, index: Int[Tensor, "batch sets slots"]) -> Tensor | None:
        """Which slots hold image tokens, from the indices of their tokens."""
        if self.is_image is None:
            return None
        images, times = self.by_index(self.is_image.to(index.device)), index.shape[0] // self.batch
        return taken(images if times == 1 else images.repeat(times, 1), index)

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
        for name in self._of_rows:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        for layers, into in self.went_into.items():
            self.went_into[layers] = into.index_select(0, index.to(into.device))

    def tokens_after(self, positions: int) -> Counts:
        """Tokens of each row that stand after so many positions; waits for the device if there is padding."""
        if self.valid is None or positions >= self.valid.shape[1]:
            return np.full(self.batch, self.seen - positions)
        return self.known_valid(self.valid.device)[:, positions:].sum(1).cpu().numpy()

    def crop(self, positions: int, gone: Counts) -> None:
        """Forgets all but so many first positions, and so many tokens of each row."""
        self.row_seen = self.row_seen - gone
        for name in self._of_positions:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[:, :positions])
        if self.rotary_offsets is not None and positions < self.rotary_offsets.shape[1]:
            self.rotary_offsets = self.rotary_offsets[:, :positions]
            self.rotary_offset = self.rotary_offsets[:, -1:]
        self.went_into = {layers: into[:, :positions] for layers, into in self.went_into.items()}
        self.seen = positions

    def _hide(self, hidden: Bool[Tensor, "batch positions"]) -> tuple[Tensor, Callable[[Counts], Counts]]:
        """Makes padding of tokens that were seen; waits for the device.

        Returns:
            For every token index before, the one after, -1 for tokens that are hidden now; and what tells, of the
            tokens before an index of each row, how many are left.
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

        self.row_seen = left(self.row_seen)
        return new_index, left


def taken(of_tokens: Tensor, index: Int[Tensor, "batch sets slots"], fill: bool | int = False) -> Tensor:
    """Entries of a tensor over token indices, `[batch, tokens]`, for the tokens in slots; filled for empty ones."""
    if not of_tokens.shape[1]:
        return torch.full(index.shape, fill, dtype=of_tokens.dtype, device=index.device)
    flat = index.flatten(1).clamp(min=0, max=of_tokens.shape[1] - 1).long()
    return of_tokens.gather(1, flat).view(index.shape).masked_fill(index < 0, fill)
