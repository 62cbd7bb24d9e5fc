"""MixKV: importance where keys differ, diversity where they are alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.projection import slot_norm
from kvcompress.policies.registry import SCORERS
from kvcompress.policies.scorers.snapkv import SnapKV

_LEAST = torch.finfo(torch.float32).tiny
_MOST_REDUNDANT = 0.999  # so that importance always counts


@SCORERS.register("mixkv")
class MixKV(SnapKV):
    """Attention of the last queries and norms of values, mixed with how a key differs, by how alike a head's keys are.

    Source: MixKV (arXiv 2510.20707; its released code, "headwisemixkv", for the scales). Made for images, whose keys
    are alike in many heads.

    With u the keys of a head at unit length and r the mean cosine of all pairs of them, a slot scores
    (1 - r) (votes + norms) + r (diversity): votes as in `snapkv`, norms those of the values, diversity minus the cosine
    between u and the mean of all u. Norms and diversity go from 0 to 1 within the head, times a factor that brings
    their mean to that of the votes.

    *Deviates:* ranges and means are those of all slots of the head, where the code leaves out the window, which it
    keeps; r stays between 0 and 0.999.

    Args:
        window: number of last queries (tokens) that vote, and of last tokens that are protected.
        kernel: width of the pooling of votes in slots, odd; 1 for none.
        pool: "avg", where slots beyond the end count as zero, or "max".
    """

    def score(self, layer: LayerContext) -> Importance:
        """Costs two passes over the keys and one over the values more than `snapkv`."""
        votes = layer.at_tokens(super().score(layer))
        unit = F.normalize(layer.keys.float(), dim=-1)
        if layer.valid is not None:
            unit = torch.where(layer.valid.unsqueeze(-1), unit, 0.0)
        count = layer.held.clamp(min=1)
        total = unit.sum(2, keepdim=True)
        # The squared length of the sum is the sum over all pairs; a key with itself has the cosine 1.
        pairs = total.square().sum(-1) - unit.square().sum(-1).sum(-1, keepdim=True)
        redundancy = (pairs / (count * (count - 1)).clamp(min=1)).clamp(0.0, _MOST_REDUNDANT)
        cosine = (unit @ F.normalize(total, dim=-1).transpose(2, 3)).squeeze(-1)
        norm = slot_norm(layer.values)
        norms, diversity = (_scaled(of, votes, layer) for of in (norm, -cosine))
        return (1 - redundancy) * (votes + norms) + redundancy * diversity


def _scaled(score: Importance, votes: Importance, layer: LayerContext) -> Importance:
    """Brought to zero at the least of a head, and to the mean of its votes; zero where all are equal."""
    low = layer.at_tokens(score, otherwise=torch.inf).amin(-1, keepdim=True)
    above = layer.at_tokens(score - low)
    return above * (votes.sum(-1, keepdim=True) / above.sum(-1, keepdim=True).clamp(min=_LEAST))
