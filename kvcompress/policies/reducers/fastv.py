"""Half of the image tokens dropped after two layers."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.context import LayerContext, Reduced, ReductionContext
from kvcompress.policies.reducers.staged import Dropping, Share, attention_of_last, dropping, layers_at
from kvcompress.policies.registry import REDUCERS


@REDUCERS.register("fastv")
class FastV(Dropping):
    """Drops the image tokens that the last token attends to least, once and early.

    Source: FastV (arXiv 2403.06764, section 4).

    Args:
        layer: layers that see all tokens (the paper's K).
        drop: share of the image tokens that is dropped after them (the paper's R).
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    reads_attention: ClassVar[bool] = True

    layer: int = Field(default=2, ge=1)
    drop: Share = 0.5

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """Once, after `layer` layers."""
        return layers_at(self, (self.layer,), layers)

    def share(self, stage: int) -> float:
        """What `drop` leaves."""
        return 1.0 - self.drop

    def guidance(self, layer: LayerContext) -> Float[Tensor, "batch tokens"]:
        """Attention of the last token, head mean."""
        return attention_of_last(layer)

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Keeps the tokens with most attention."""
        assert layer.guidance is not None
        return dropping(layer, layer.guidance, self.keep(layer))
