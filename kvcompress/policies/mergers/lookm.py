"""Evicted tokens go into the most similar kept token, by one of LOOK-M's three rules."""

from __future__ import annotations

from typing import Literal

import torch

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("lookm")
class LookM(Merger):
    """Merges every evicted token into the kept token with the most similar key.

    Source: LOOK-M (arXiv 2406.18139, section 3.3). A kept key or value k that takes up e_1 .. e_n, whose keys have the
    cosines s_1 .. s_n with its own, becomes

    - "average": (k + e_1 + .. + e_n) / (n + 1);
    - "pivotal": (k + (k + e_1) / 2 + .. + (k + e_n) / 2) / (n + 1), which with one evicted token is 3/4 k + 1/4 e_1;
    - "weighted": (k + s_1 e_1 + .. + s_n e_n) / (n + 1), whose weights do not add up to one, so that what is less
      similar also makes the result shorter.

    *Deviates:* the paper looks for the most similar among kept tokens of either modality, as `within_modality=False`
    does. As in the paper, only the prompt's tokens are merged; what decode steps free is dropped.

    Args:
        rule: "average", "pivotal" or "weighted", as above.
        within_modality: whether image tokens merge into kept image tokens alone and text into text; where none of the
            same modality is kept, evicted tokens are dropped.
    """

    rule: Literal["average", "pivotal", "weighted"] = "average"
    within_modality: bool = True

    @property
    def reads_modality(self) -> bool:
        """Unless tokens merge into either modality."""
        return self.within_modality

    def merge(self, layer: MergeContext) -> Merged:
        """Each rule is a weighted sum; values have the weights of their keys."""
        pairs = most_similar(layer, self.within_modality)
        own, count = torch.ones(1, 1, 1, dtype=torch.float32, device=layer.keys.device), pairs.count
        weights = own, own
        if self.rule == "pivotal":
            weights = own + count / 2, own / 2
        elif self.rule == "weighted":
            weights = own, pairs.similarity
        keys, values = (pairs.fold(tensor, *weights, count + 1) for tensor in (layer.keys, layer.values))
        return Merged(keys, values)
