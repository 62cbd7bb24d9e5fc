"""One forward pass in progress."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from kvcompress.cache.allocation import Allocation
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.sequence import Sequence
from kvcompress.errors import CacheStateError


@dataclass
class Forward:
    """A forward pass in progress.

    Attributes:
        columns: columns of the tokens that the next layer gets, `[1 or batch, tokens]`.
        spans: per row, indices of these tokens that are no padding; None if none is.
        scores: whether it scores (the first forward, and every one of several tokens) or decodes.
        next_layer: layer whose attention comes next.
        local: the allocation, where it needs no scores and is known from the start.
        limits: slots that each layer may hold after a decode step.
        rooms: most slots that each layer will ever need, where that is known.
        reduction: what a reducer does to its images; None if there are none.
    """

    columns: Tensor
    spans: list[Tensor] | None
    scores: bool
    next_layer: int = 0
    local: Allocation | None = None
    limits: list[list[int]] | None = None
    rooms: list[int] | None = None
    reduction: Reduction | None = None


def hidden_tokens(mask: Tensor | None, sequence: Sequence) -> Bool[Tensor, "batch columns"] | None:
    """Which tokens seen before are hidden by the mask of this forward for the first time; None if none is.

    Args:
        mask: None, or bool `[batch, 1, queries, columns]` over all columns seen and the new ones.
        sequence: what was seen before this forward.

    Raises:
        CacheStateError: if the mask shows a column that was padding, or was hidden, before.
    """
    if mask is None or not sequence.seen:
        return None
    shown = mask[:, 0, -1, : sequence.seen]
    if sequence.valid is None:
        return None if bool(shown.all()) else ~shown
    check_hidden_stays(shown, sequence)
    hidden = sequence.valid.to(shown.device) & ~shown
    return hidden if bool(hidden.any()) else None


def check_hidden_stays(shown: Bool[Tensor, "rows columns"], sequence: Sequence) -> None:
    """Raises CacheStateError if the columns shown include one that was padding, or was hidden, before."""
    valid = sequence.valid
    if valid is None or valid.shape != shown.shape:
        return
    again = shown & ~valid.to(shown.device)
    if bool(again.any()):
        row, column = again.nonzero()[0].tolist()
        raise CacheStateError(
            f"attention_mask: shows column {column} of row {row}, which an earlier mask hid, so the cache no longer "
            "holds it; go on hiding it, or call reset() and run the whole conversation again"
        )


def valid_tokens(
    mask: Tensor | None, batch: int, queries: int, sequence: Sequence
) -> Bool[Tensor, "batch queries"] | None:
    """Which of a forward's columns hold a token; None if all do.

    Args:
        mask: None, or bool `[batch, 1, queries, columns]` over all columns seen and the new ones.
        batch: rows of the forward.
        queries: columns of the forward.
        sequence: what was seen before it.

    Raises:
        CacheStateError: if the rows are others than those seen, or the mask does not cover what was seen.
    """
    if sequence.batch not in (0, batch):
        raise CacheStateError(
            f"batch: the cache holds {sequence.batch} rows, this forward has {batch}; call reset() for another "
            "batch, or batch_repeat_interleave / batch_select_indices to change the rows"
        )
    if mask is None:
        return None
    valid = mask[:, 0, -1, sequence.seen :]
    if sequence.seen and not bool(valid[:, -1].any()):
        raise CacheStateError(
            f"attention_mask: hides the last of the {queries} new tokens in every row; it must cover the "
            f"{sequence.seen} tokens seen and the new ones. For a new conversation call reset()"
        )
    return None if bool(valid.all()) else valid
