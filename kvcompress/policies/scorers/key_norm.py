"""Keys of small norm draw attention."""

from __future__ import annotations

from typing import ClassVar

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.projection import slot_norm
from kvcompress.policies.registry import SCORERS


@SCORERS.register("key_norm")
class KeyNorm(Scorer):
    """Minus the L2 norm of a slot's key: the smaller the key, the more attention it tends to get.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430).

    *Deviates:* the paper leaves the first two layers whole; here every layer has the size that the allocator gives it.
    """

    independent: ClassVar[bool] = True

    def score(self, layer: LayerContext) -> Importance:
        """Needs no attention, and one pass over the keys."""
        return layer.at_tokens(-slot_norm(layer.keys))
