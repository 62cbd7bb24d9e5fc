"""Evicted tokens are merged only where they are similar enough to a kept one."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.similarity import SimilarPairs, most_similar
from kvcompress.policies.registry import MERGERS


@MERGERS.register("threshold")
class Threshold(Merger):
    """Merges an evicted token into the kept token with the most similar key if they are similar enough.

    Source: D2O (arXiv 2406.13035, section 3.3, token-level merging). With s the cosine between the key of an evicted
    token and the most similar kept one, it is merged if s >= tau and dropped otherwise. After a prompt or a turn tau is
    the mean of all s; each token that a decode step frees first moves it to beta * s + (1 - beta) * tau. A kept key or
    value k that takes up e_1 .. e_n becomes (exp(1) k + exp(s_1) e_1 + .. + exp(s_n) e_n) / (exp(1) + exp(s_1) + .. +
    exp(s_n)).

    *Deviates:* every key/value head has a tau of its own. Where several tokens are freed at once after a draft was
    checked, their mean s moves it once. Similarities are compared with tau in steps of 2**-16.

    Args:
        beta: share of a freed token's similarity in the new tau, in [0, 1].
        decoding: whether tokens that decode steps free are merged too; if not, they are dropped.
    """

    beta: float = Field(default=0.7, ge=0, le=1)
    decoding: bool = True

    @property
    def merges_decoding(self) -> bool:
        """As chosen."""
        return self.decoding

    def merge(self, layer: MergeContext) -> Merged:
        """Moves the threshold, then merges what reaches it."""
        pairs = most_similar(layer, within_modality=False, cosines=True)
        tau = self._threshold(layer, pairs)
        pairs = replace(pairs, taken=pairs.taken & (pairs.rounded >= tau.unsqueeze(-1)))
        assert pairs.similarity is not None
        weight = pairs.similarity.exp()
        own = weight.new_full((1, 1, 1), math.e)
        return Merged(*pairs.fold(layer, own, weight, pairs.total(weight) + own), tau)

    def _threshold(self, layer: MergeContext, pairs: SimilarPairs) -> Float[Tensor, "batch kv_heads"]:
        """What tau becomes; NaN where nothing was ever evicted."""
        count = pairs.taken.sum(-1)
        # Multiples of the grid add up exactly in float64, in whatever order.
        mean = (torch.where(pairs.taken, pairs.rounded, 0.0).double().sum(-1) / count).float()
        if layer.state is None:
            return mean
        moved = torch.lerp(layer.state, mean, self.beta) if layer.decoding else mean
        return torch.where(count > 0, torch.where(layer.state.isnan(), mean, moved), layer.state)
