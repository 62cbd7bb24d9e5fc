"""Image tokens that differ from each other and have to do with the instruction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.policies.context import ReductionContext
from kvcompress.policies.reducers.choosing import Choosing, Images, first_picked
from kvcompress.policies.reducers.staged import Depth, Share
from kvcompress.policies.registry import REDUCERS

_LEAST = 1e-6  # of relevance, as in the released code
_SPENT = 1e-5  # what is left of a token's volume that counts as none


@REDUCERS.register("cdpruner")
class CDPruner(Choosing):
    """Keeps the image tokens whose volume, scaled by what they have to do with the instruction, is largest.

    Source: CDPruner (arXiv 2506.10967, its determinantal choice by the greedy rule of arXiv 1709.05135; its released
    code for the bounds).

    With c the cosine of two tokens' states and r the relevance, from 0 to 1 within the row, tokens have the kernel
    r_i c_ij r_j. One after another, the token is kept that makes the determinant of those kept largest.

    *Deviates:* relevance is the mean cosine between a token and the text after the row's last image (all text where
    none follows it), in the states that go into the layer; the code asks both towers of CLIP, of which a language model
    has none, and counts the least alike as most relevant. The share that stays is rounded down. Once no token adds any
    volume, those of highest relevance follow.

    Args:
        after: layers that have run when it acts, or a fraction of the depth; 0, the paper's, before the first.
        drop: share of the image tokens that is dropped (the paper keeps 64 of 576).
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    after: Depth = 0
    drop: Share = 0.888

    def chosen(self, layer: ReductionContext, images: Images, keep: list[int]) -> Bool[Tensor, "batch images"]:
        """Greedily, in float64; costs images^2 x (hidden + kept)."""
        relevance = _relevance(layer, images).double()
        cosine = (images.unit @ images.unit.transpose(1, 2)).double()
        kernel = relevance.unsqueeze(2) * cosine * relevance.unsqueeze(1)
        left = kernel.diagonal(dim1=1, dim2=2).masked_fill(~images.valid, -torch.inf)
        last = (relevance - 2).masked_fill(~images.valid, -torch.inf)  # what counts once no volume is left
        count, picked = min(max(keep), left.shape[1]), []
        parts, gone = kernel.new_zeros(len(kernel), count, left.shape[1]), torch.full_like(left[:, :1], -torch.inf)
        for number in range(count):
            one = torch.where(left < _SPENT, last, left).argmax(1, keepdim=True)
            picked.append(one)
            across, before = one.unsqueeze(2), parts[:, :number]
            row = kernel.gather(1, across.expand(-1, -1, kernel.shape[2]))
            known = before.gather(2, across.expand(-1, number, -1)).transpose(1, 2)
            volume = left.gather(1, one).unsqueeze(2)
            factor = torch.where(volume < _SPENT, 0.0, volume.rsqrt())
            part = parts[:, number : number + 1].copy_(torch.baddbmm(row, known, before, alpha=-1).mul_(factor))
            left.addcmul_(part[:, 0], part[:, 0], value=-1).scatter_(1, one, gone)
            last.scatter_(1, one, gone)
        return first_picked(images, picked, keep)


def _relevance(layer: ReductionContext, images: Images) -> Float[Tensor, "batch images"]:
    """Mean cosine with the instruction, brought to 0 (and a little more) to 1 within the row."""
    places = torch.arange(layer.is_image.shape[1], device=layer.is_image.device)
    text = (layer.index >= 0) & ~layer.is_image
    last = torch.where(layer.is_image, places, -1).amax(1, keepdim=True)
    after = text & (places > last)
    asks = torch.where(after.any(1, keepdim=True), after, text).unsqueeze(-1).float()
    unit = F.normalize(layer.hidden.float(), dim=-1)
    mean = (unit * asks).sum(1, keepdim=True) / asks.sum(1, keepdim=True).clamp(min=1)
    cosine = (images.unit @ mean.transpose(1, 2)).squeeze(-1)
    low = cosine.masked_fill(~images.valid, torch.inf).amin(1, keepdim=True)
    high = cosine.masked_fill(~images.valid, -torch.inf).amax(1, keepdim=True)
    relevance = (cosine - low + _LEAST) / (high - low).clamp(min=_LEAST)
    return torch.where(images.valid, relevance, 0.0)
