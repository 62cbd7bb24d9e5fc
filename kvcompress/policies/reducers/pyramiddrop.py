"""Half of the image tokens dropped after each quarter of the depth."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvcompress.policies.context import LayerContext, Reduced, ReductionContext
from kvcompress.policies.reducers.staged import Depth, Share, Staged, attention_of_last, dropping
from kvcompress.policies.registry import REDUCERS


@REDUCERS.register("pyramiddrop")
class PyramidDrop(Staged):
    """Drops image tokens in stages, those that the last token of the prompt attends to least.

    Source: PyramidDrop (arXiv 2410.17247, section 3).

    *Deviates:* the attention is that of the layer that ends a stage, where the released code asks the next layer's
    projections; and of the last token of all, where the paper asks the last one of the instruction, which a few
    tokens of the chat template follow. The released code numbers survivors anew in every layer, in decoding too:
    that is `positions="per_layer"`, as in the preset.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth.
        keep_shares: share of the image tokens that stays from each of them on.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    reads_attention: ClassVar[bool] = True

    after: tuple[Depth, ...] = (0.25, 0.5, 0.75)
    keep_shares: tuple[Share, ...] = (0.5, 0.25, 0.125)

    def guidance(self, layer: LayerContext) -> Float[Tensor, "batch tokens"]:
        """Attention of the last token, head mean."""
        return attention_of_last(layer)

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Keeps the tokens with most attention."""
        assert layer.guidance is not None
        return dropping(layer, layer.guidance, self.keep(layer))
