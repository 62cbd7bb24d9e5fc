"""KeyDiff: keys that point where most keys point can go."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("key_diff")
class KeyDiff(Scorer):
    """Minus the cosine of a slot's key to the mean of all keys of its head, each taken at unit length.

    Source: KeyDiff (arXiv 2504.15364, section 3: the variant with one anchor, the mean of the unit keys).

    The mean over unit keys ranks slots by their mean cosine to all keys, without the matrix of all pairs.
    """

    def score(self, layer: LayerContext) -> Importance:
        """Needs no attention, and two passes over the keys; empty slots only make the mean shorter."""
        unit = F.normalize(layer.keys.float(), dim=-1)
        if layer.valid is not None:
            unit = torch.where(layer.valid.unsqueeze(-1), unit, 0.0)
        mean = F.normalize(unit.mean(2, keepdim=True), dim=-1)
        return -(unit @ mean.transpose(2, 3)).squeeze(-1)
