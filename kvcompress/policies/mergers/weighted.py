"""Evicted tokens enter the most similar kept token by how similar they are."""

from __future__ import annotations

import torch

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("weighted")
class Weighted(Merger):
    """Averages every evicted token, times its similarity, into the kept token with the most similar key.

    Source: LOOK-M (arXiv 2406.18139, section 3.3, weighted merging). A kept key or value k that takes up e_1 .. e_n,
    whose keys have the cosines s_1 .. s_n with its own, becomes (k + s_1 e_1 + .. + s_n e_n) / (n + 1). The weights do
    not add up to one, so what is less similar also makes the result shorter.

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
        """Weighs evicted slots with the cosines of their keys, their values as well."""
        pairs, one = most_similar(layer, self.within_modality), torch.ones(1, 1, 1, device=layer.keys.device)
        divisor = pairs.count + 1
        keys, values = (pairs.fold(tensor, one, pairs.similarity, divisor) for tensor in (layer.keys, layer.values))
        return Merged(keys, values)
