"""Attention to a prompt of which a part is being repeated, in such a way that it tells what scores are shared among."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels import Softmax, attend_blocks, attention_with_mask, merge_attention, with_sinks

_FIRST = 4  # tokens of the prompt that count whatever part is repeated


@dataclass(frozen=True)
class Near:
    """Slots that the probabilities of a repetition are shared among: first ones, the part, and the repetition's own.

    Attributes:
        first: how many of the first slots.
        start: where the part begins.
        stop: where it ends.
        past: slots before the repetition's own.
    """

    first: int
    start: int
    stop: int
    past: int

    @classmethod
    def of(cls, part: slice, past: int) -> Near:
        """For a part of so many slots."""
        start, stop, _ = part.indices(past)
        return cls(min(_FIRST, start), start, stop, past)

    @property
    def asked(self) -> slice:
        """Where the part lies among the slots taken."""
        return slice(self.first, self.first + self.stop - self.start)

    def taken(self, of_slots: Tensor) -> Tensor:
        """What a tensor says of these slots, `[batch, heads, slots, ...]`."""
        if self.stop - self.start + self.first == self.past:
            return of_slots
        return torch.cat([of_slots[:, :, s] for s in self._slices(near=True)], 2)

    def left(self, of_slots: Tensor) -> Tensor:
        """What it says of the others."""
        return torch.cat([of_slots[:, :, s] for s in self._slices(near=False)], 2)

    def _slices(self, near: bool) -> tuple[slice, ...]:
        if near:
            return slice(self.first), slice(self.start, self.stop), slice(self.past, None)
        return slice(self.first, self.start), slice(self.stop, self.past)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
        valid: Tensor | None,
        last_seen: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over all slots, and the log-sum-exp of each query's logits over those that are near.

        Args:
            query: `[batch, heads, queries, head_dim]`.
            keys: `[batch, kv_heads, slots, head_dim]`, those of the queries' own tokens last.
            values: likewise.
            softmax: what the model makes of their products.
            valid: which slots hold a token, `[batch, sets, slots]`; None if all do.
            last_seen: number of the last of the queries' own tokens that each query sees; None if it is its own.
        """
        own, past = None if valid is None else self.taken(valid), self.first + self.stop - self.start
        scaling, softcap = softmax.scaling, softmax.softcap
        blocks = [(self.taken(keys), self.taken(values))]
        output, near = attend_blocks(query, blocks, past, scaling, own, True, softcap, last_seen)
        assert near is not None
        lse = near
        if past < self.past:
            others = None if valid is None else self.left(valid)[:, 0]
            far = attention_with_mask(
                query, self.left(keys), self.left(values), scaling, others, causal=False, softcap=softcap
            )
            output, lse = merge_attention(output, near, *far)
        return with_sinks(output, lse, softmax.sinks)[0], near
