"""Image tokens that are as far from each other as can be."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from kvcompress.policies.context import ReductionContext
from kvcompress.policies.reducers.choosing import Choosing, Images, first_picked
from kvcompress.policies.reducers.staged import Depth, Share
from kvcompress.policies.registry import REDUCERS

_GRID = 2**16  # distances are compared in steps of 1 / 2**16, so that rounding does not decide between equals


@REDUCERS.register("divprune")
class DivPrune(Choosing):
    """Keeps image tokens of the largest least distance from each other, before the first layer.

    Source: DivPrune (arXiv 2503.02175, algorithm 1).

    The distance of two tokens is one minus the cosine of their states. The first one kept is the token whose nearest
    other is farthest; then, again and again, the token that is farthest from the nearest of those kept.

    *Deviates:* the share that stays is rounded down, to the nearest in the paper. Distances are compared in steps of
    2**-16, and the earlier of equal ones wins.

    Args:
        after: layers that have run when it acts, or a fraction of the depth; 0, the paper's, before the first.
        drop: share of the image tokens that is dropped (the paper keeps 9.8 %).
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    after: Depth = 0
    drop: Share = 0.902

    def chosen(self, layer: ReductionContext, images: Images, keep: list[int]) -> Bool[Tensor, "batch images"]:
        """Greedily; costs images^2 x hidden."""
        distance = ((1 - images.unit @ images.unit.transpose(1, 2)) * _GRID).round()
        own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
        nearest, picked = distance.masked_fill(own | ~images.valid.unsqueeze(1), torch.inf).amin(2), []
        gone = torch.full_like(nearest[:, :1], -torch.inf)
        nearest = nearest.masked_fill(~images.valid, -torch.inf)
        for number in range(min(max(keep), nearest.shape[1])):
            one = nearest.argmax(1, keepdim=True)
            picked.append(one)
            to_it = distance.gather(1, one.unsqueeze(2).expand(-1, -1, distance.shape[2])).squeeze(1)
            nearest = torch.minimum(nearest, to_it) if number else to_it.masked_fill(~images.valid, -torch.inf)
            nearest.scatter_(1, one, gone)
        return first_picked(images, picked, keep)
