"""TOVA: what the last token attends to."""

from __future__ import annotations

from typing import ClassVar

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("tova")
class TOVA(Scorer):
    """Attention probability that the last query gives to a slot, averaged over all heads of the layer.

    Source: TOVA, in Transformers are Multi-State RNNs (arXiv 2401.06104).

    *Deviates:* the paper drops the lowest token at every decode step; here scores come from prompts and turns, and
    between them the evictor's decode rule applies.
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    def score(self, layer: LayerContext) -> Importance:
        """One row of the softmax: the same for every key/value head, or its own where heads hold different tokens."""
        probability = layer.attention_probabilities(last=1).squeeze(2)
        if layer.heads_part:
            return probability.unflatten(1, (layer.keys.shape[1], -1)).mean(2)  # type: ignore[no-untyped-call,no-any-return]
        return layer.heads.mean(probability.mean(1, keepdim=True)).expand(layer.keys.shape[:3])
