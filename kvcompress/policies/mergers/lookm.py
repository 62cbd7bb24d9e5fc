"""Evicted tokens go into the most similar kept token, by one of LOOK-M's three rules or by their mass."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import SimilarPairs, most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("lookm")
class LookM(Merger):
    """Merges every evicted token into the kept token with the most similar key.

    Source: LOOK-M (arXiv 2406.18139, section 3.3). A kept key or value k that takes up e_1 .. e_n, whose keys have the
    cosines s_1 .. s_n with its own, becomes

    - "average": (k + e_1 + .. + e_n) / (n + 1);
    - "pivotal": (k + (k + e_1) / 2 + .. + (k + e_n) / 2) / (n + 1), which with one evicted token is 3/4 k + 1/4 e_1;
    - "weighted": (k + s_1 e_1 + .. + s_n e_n) / (n + 1), whose weights do not add up to one, so that what is less
      similar also makes the result shorter;
    - "mass", ours: (m k + m_1 e_1 + .. + m_n e_n) / (m + m_1 + .. + m_n), with the mass of each as its weight, so that
      what nobody looked at does not dilute what was. A kept token counts at least as much as any that it takes up; a
      token without mass, or without a score, is dropped. Needs a scorer of mass.

    *Deviates:* the paper looks for the most similar among kept tokens of either modality, as `within_modality=False`
    does. As in the paper, only the prompt's tokens are merged; what decode steps free is dropped.

    Args:
        rule: "average", "pivotal", "weighted" or "mass"; the source has the formula of each.
        within_modality: whether image tokens merge into kept image tokens alone and text into text; where none of the
            same modality is kept, evicted tokens are dropped.
    """

    rule: Literal["average", "pivotal", "weighted", "mass"] = "average"
    within_modality: bool = True

    @property
    def reads_mass(self) -> bool:  # type: ignore[override]
        """As the weight of a token, by the rule of that name."""
        return self.rule == "mass"

    @property
    def reads_modality(self) -> bool:
        """Unless tokens merge into either modality."""
        return self.within_modality

    def merge(self, layer: MergeContext) -> Merged:
        """Each rule is a weighted sum; values have the weights of their keys."""
        pairs = most_similar(layer, self.within_modality, cosines=self.rule == "weighted")
        own = weight = torch.ones(1, 1, 1, dtype=torch.float32, device=layer.keys.device)
        if self.rule == "mass":
            pairs, weight = _by_mass(layer, pairs)
            return Merged(*pairs.fold(layer, own, weight, pairs.total(weight) + own))
        count = pairs.total(own)
        divisor = count + own
        if self.rule == "pivotal":
            own, weight = own + count / 2, own / 2
        elif pairs.similarity is not None:
            weight = pairs.similarity
        return Merged(*pairs.fold(layer, own, weight, divisor))


def _by_mass(layer: MergeContext, pairs: SimilarPairs) -> tuple[SimilarPairs, Float[Tensor, "batch kv_heads evicted"]]:
    """Pairs without those of no mass, and the mass of each evicted slot as a share of its kept one's, at most 1."""
    if layer.importance is None:
        raise ValueError("merger lookm: rule='mass' needs importance: choose a scorer of mass")
    mass = layer.importance.nan_to_num(nan=0.0)
    kept, evicted = mass.gather(-1, pairs.kept), torch.where(pairs.taken, mass.gather(-1, pairs.evicted), 0.0)
    pairs, most = replace(pairs, taken=evicted > 0), kept.scatter_reduce(-1, pairs.target, evicted, "amax")
    return pairs, torch.where(pairs.taken, evicted / most.gather(-1, pairs.target), 0.0)
