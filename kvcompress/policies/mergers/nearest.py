"""Evicted tokens are averaged into the kept token next to them."""

from __future__ import annotations

import torch

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.pairs import nearest
from kvcompress.policies.registry import MERGERS


@MERGERS.register("nearest")
class Nearest(Merger):
    """Averages every evicted token into the kept token that is nearest in the sequence.

    Source: Elastic Cache (arXiv 2407.18121, section 3: cache merging around anchor points). A kept key or value k with
    the evicted e_1 .. e_n nearest to it becomes (k + e_1 + .. + e_n) / (n + 1).

    *Deviates:* the released code compares ranks with a count and so does not keep the highest scores; which tokens are
    kept is the evictor's matter here. Distances are in tokens of the row, padding left out, and of two kept tokens at
    the same distance the earlier one takes up the evicted token. What decode steps free is dropped.
    """

    def merge(self, layer: MergeContext) -> Merged:
        """Takes the plain mean of each kept slot and what is nearest to it."""
        pairs, one = nearest(layer), torch.ones(1, 1, 1, dtype=torch.float32, device=layer.keys.device)
        return Merged(*pairs.fold(layer, one, one, pairs.total(one) + one))
