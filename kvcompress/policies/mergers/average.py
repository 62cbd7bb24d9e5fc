"""Evicted tokens are averaged into the most similar kept token."""

from __future__ import annotations

import torch

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("average")
class Average(Merger):
    """Averages every evicted token into the kept token with the most similar key.

    Source: LOOK-M (arXiv 2406.18139, section 3.3, averaged merging). A kept key or value k that takes up e_1 .. e_n
    becomes (k + e_1 + .. + e_n) / (n + 1).

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
        """Takes the plain mean of each kept slot and what is most similar to it."""
        pairs, one = most_similar(layer, self.within_modality), torch.ones(1, 1, 1, device=layer.keys.device)
        divisor = pairs.count + 1
        keys, values = (pairs.fold(tensor, one, one, divisor) for tensor in (layer.keys, layer.values))
        return Merged(keys, values)
