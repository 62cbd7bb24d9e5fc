"""Evicted tokens are first averaged with the most similar kept token, then into it."""

from __future__ import annotations

import torch

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("pivotal")
class Pivotal(Merger):
    """Averages the most similar kept token, the pivot, with the midpoints between it and each evicted token.

    Source: LOOK-M (arXiv 2406.18139, section 3.3, pivotal merging). A kept key or value k that takes up e_1 .. e_n
    becomes (k + (k + e_1) / 2 + .. + (k + e_n) / 2) / (n + 1); with one evicted token that is 3/4 k + 1/4 e_1.

    *Deviates:* the paper looks for the most similar among kept tokens of either modality, as `within_modality=False`
    does. As in the paper, only the prompt's tokens are merged; what decode steps free is dropped.

    Args:
        within_modality: whether image tokens merge into kept image tokens alone and text into text; where none of the
            same modality is kept, evicted tokens are dropped.
    """

    within_modality: bool = True

    @property
    def reads_modality(self) -> bool:
        """Unless tokens merge into either modality."""
        return self.within_modality

    def merge(self, layer: MergeContext) -> Merged:
        """Writes the mean of the midpoints as one weighted sum."""
        pairs = most_similar(layer, self.within_modality)
        count, half = pairs.count, torch.full((1, 1, 1), 0.5, device=layer.keys.device)
        keys, values = (pairs.fold(t, 1 + count / 2, half, count + 1) for t in (layer.keys, layer.values))
        return Merged(keys, values)
