"""The last queries of a layer, for scores between two forwards of several tokens."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.cache.store import fixed, with_rows
from kvcompress.kernels import Softmax
from kvcompress.policies.context import Queries


@dataclass
class Recent:
    """What a layer remembers of the last decode steps, in a ring that keeps its address.

    Attributes:
        query: queries of the last `window` positions, after rotary embedding; that of a position at its number modulo
            `window`.
        scaling: factor on the logits.
        softcap: what logits stay below; None if they are let be.
        sinks: a logit of each head that the softmax runs over too; None if there is none.
    """

    query: Float[Tensor, "batch heads window head_dim"]
    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @classmethod
    def room_for(
        cls,
        before: Recent | None,
        query: Queries,
        window: int,
        softmax: Softmax,
    ) -> Recent:
        """Room for the queries to come, which are like those given; the room that was there before if it fits."""
        shape = (*query.shape[:2], window, query.shape[3])
        if before is not None and before.query.shape == shape and before.query.dtype == query.dtype:
            ring = before.query
        else:
            ring = fixed(query.new_zeros(shape))
        sinks = None if softmax.sinks is None else softmax.sinks.detach().clone()
        return cls(ring, softmax.scaling, softmax.softcap, sinks)

    def write(self, query: Queries, place: Int[Tensor, " one"]) -> None:
        """Takes the query of a decode step."""
        self.query.index_copy_(2, place.to(query.device), query.to(self.query.dtype))

    def in_order(self, positions: int) -> Queries:
        """The queries of the last positions seen, the oldest first; of so many positions."""
        return self.query.roll(-(positions % self.query.shape[2]), 2)

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Reorders, repeats or drops rows; in place where their number stays."""
        self.query = with_rows(self.query, index)

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [one for one in (self.query, self.sinks) if one is not None]
