"""What an attention mask says of a step's positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.sequence import Sequence
from kvcompress.errors import CacheStateError


@dataclass
class Mask:
    """What an attention mask says of a step's positions.

    Attributes:
        hidden: which of the positions seen it hides from now on; None if none.
        new_valid: which of the new positions hold a token; None if all do.
        row_new: tokens of each row among these.
        order: the new positions with each row's padding first; None if it is first already.
        last_seen: number of the last new position that each new one sees, padding or not, where the model lets some
            see more than what came before them; None if it lets none.
    """

    hidden: Bool[Tensor, "batch seen"] | None
    new_valid: Bool[Tensor, "batch positions"] | None
    row_new: Counts
    order: Int[Tensor, "batch positions"] | None
    last_seen: Int[Tensor, "batch positions"] | None = None

    def last_in_order(self) -> Int[Tensor, "batch positions"] | None:
        """The same with each row's padding first: the number of the last of its tokens that each sees there."""
        if self.last_seen is None or self.new_valid is None:
            return self.last_seen
        new = self.new_valid.to(self.last_seen.device)
        padding, own = (~new).sum(1, keepdim=True), torch.arange(new.shape[1], device=new.device)
        last = padding + new.cumsum(1).gather(1, self.last_seen) - 1
        if self.order is not None:
            last = last.gather(1, self.order.to(last.device))
        return torch.where(own < padding, own, last)


def read_mask(
    sequence: Sequence, mask: Tensor | None, shape: tuple[int, int], last_seen: Tensor | None = None
) -> Mask | None:
    """What a mask says; None if it says nothing but that tokens are as they were and all new positions hold one.

    Waits for the device once if there is a mask, unless it is on the CPU and says nothing. Changes nothing.

    Args:
        sequence: what was seen.
        mask: of padding, `[batch, positions]`; None if there is none.
        shape: rows and positions of the forward.
        last_seen: see `Mask.last_seen`.

    Raises:
        CacheStateError: if the mask does not cover what was seen, or shows what was padding.
    """
    seen, (rows, queries) = sequence.seen, shape
    ahead = None if last_seen is None else Mask(None, None, np.full(rows, queries), None, last_seen)
    if mask is None or _says_nothing(sequence, mask):
        return ahead
    positions = mask.to(torch.bool)
    past, new = positions[:, :seen], positions[:, seen : seen + queries]
    known = sequence.known_valid(positions.device) if seen else past
    hidden, unordered = known & ~past, new[:, 1:] < new[:, :-1]
    flags = hidden.any(), (past & ~known).any(), new.all(), unordered.any(), new[:, -1].any()
    counts = torch.cat([torch.stack(flags).long(), new.sum(1)]).tolist()
    hides, shows, whole, mixed, any_last = map(bool, counts[:5])
    if seen and not any_last:
        raise CacheStateError(
            f"attention_mask: hides the last of the {queries} new tokens in every row; it must cover the {seen} "
            "tokens seen and the new ones. For a new conversation call reset()"
        )
    if shows:
        row, position = (past & ~known).nonzero()[0].tolist()
        raise CacheStateError(
            f"attention_mask: shows position {position} of row {row}, which an earlier mask hid, so the cache no "
            "longer holds it; go on hiding it, or call reset() and run the whole conversation again"
        )
    if whole and not hides:
        return ahead
    order = new.to(torch.uint8).argsort(dim=1, stable=True) if mixed else None
    row_new = np.asarray(counts[5:], dtype=np.int64)
    return Mask(hidden if hides else None, None if whole else new, row_new, order, last_seen)


def _says_nothing(sequence: Sequence, mask: Tensor) -> bool:
    """Whether a mask shows all that was seen and all that is new; on the CPU, where nobody has to wait for it."""
    if mask.device.type != "cpu":
        return False
    shown, known = mask.numpy() != 0, sequence.valid
    if known is None:
        return bool(shown.all())
    width = known.shape[1]
    return bool((shown[:, :width] == known.numpy()).all() and shown[:, width:].all())
