"""The image tokens that the vision tower itself looks at, and the others merged into a few."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers.choosing import Images
from kvcompress.policies.reducers.staged import Dropping, Share, per_row
from kvcompress.policies.registry import REDUCERS


@REDUCERS.register("visionzip")
class VisionZip(Dropping):
    """Keeps the image tokens that the vision tower's own attention dwells on, and merges the others into a few.

    Source: VisionZip (arXiv 2412.04467, sections 3.2 and 3.3; its released code for the even spread).

    The attention is that of the layer whose output the features are: what the class token gives to each, or where a
    tower has none (SigLIP), what each receives on average. The highest are kept as they are. Of the others, in order,
    tokens at even distances are kept too, and each of the rest is merged into the one of these whose key in the tower
    is most similar; they are averaged.

    *Deviates:* a row's tokens are chosen from all its images and tiles together, whose attention has the same sum; the
    paper chooses from each. Tokens are merged behind the projector, not before it, as means of all that meet; the
    released code adds the mean of those that come to the one they come to. The class token is not kept where the model
    does not take it. The paper's image is shorter for the language model: `positions="per_layer"`.

    Args:
        drop: share of the image tokens that is dropped or merged (the paper keeps 64 of 576).
        contextual: share of the tokens kept that others are merged into (the paper's 10 of 64); at 0 these are dropped.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.
    """

    reads_tower: ClassVar[bool] = True

    drop: Share = 0.888
    contextual: Share = 0.156

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """Before the first layer."""
        return (0,)

    def share(self, stage: int) -> float:
        """What `drop` leaves."""
        return 1.0 - self.drop

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Chooses, then merges; costs images^2 x the dimensions of a key."""
        if layer.tower is None:
            raise ValueError(f"reducer {self.name} needs what the vision tower says, before the first layer")
        images = Images.of(layer)
        attention, keys = layer.tower.attention.gather(1, images.place), _at(layer.tower.keys, images)
        keep = self.keep(layer)
        merged = [math.floor(count * self.contextual + 0.5) for count in keep]
        dominant, targets = self._chosen(attention, images, keep, merged)
        rest, own = images.valid & ~dominant & ~targets, torch.arange(dominant.shape[1], device=dominant.device)
        unit = F.normalize(keys.float(), dim=-1)
        likeness = (unit @ unit.transpose(1, 2)).masked_fill(~targets.unsqueeze(1), -torch.inf)
        into = torch.where(rest, likeness.argmax(2), own)
        comes = torch.zeros_like(likeness).scatter(2, into.unsqueeze(2), images.valid.unsqueeze(2).float())
        hidden = _at(layer.hidden, images)
        mean = comes.transpose(1, 2) @ hidden.float() / comes.sum(1).clamp(min=1).unsqueeze(-1)
        hidden = torch.where(targets.unsqueeze(-1), mean.to(hidden.dtype), hidden)
        goes = images.place.gather(1, into).masked_fill(rest & ~targets.any(1, keepdim=True), -1)
        return _spread(layer, images, goes, hidden)

    def _chosen(
        self, attention: Tensor, images: Images, keep: list[int], merged: list[int]
    ) -> tuple[Bool[Tensor, "batch images"], Bool[Tensor, "batch images"]]:
        """Those that stay as they are, and those that others are merged into."""
        device = attention.device
        place = torch.arange(attention.shape[1], device=device)
        order = attention.masked_fill(~images.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        few = per_row([kept - others for kept, others in zip(keep, merged, strict=True)], device)
        dominant = torch.zeros_like(images.valid).scatter(1, order, place < few) & images.valid
        others, wanted = images.valid & ~dominant, per_row(merged, device)
        step = (others.sum(1, keepdim=True) // wanted.clamp(min=1)).clamp(min=1)
        number = others.cumsum(1) - 1
        return dominant, others & (number % step == 0) & (number // step < wanted)


def _at(of_tokens: Tensor, images: Images) -> Tensor:
    """What belongs to image tokens, of what belongs to tokens."""
    return of_tokens.gather(1, images.place.unsqueeze(-1).expand(-1, -1, of_tokens.shape[2]))


def _spread(layer: ReductionContext, images: Images, goes: Tensor, hidden: Tensor) -> Reduced:
    """Where image tokens go and what they are from now on; all others as they were."""
    own = torch.arange(layer.index.shape[1], device=goes.device).repeat(len(goes), 1)
    into = own.scatter(1, images.place, torch.where(images.valid, goes, images.place))
    states = torch.where(images.valid.unsqueeze(-1), hidden, _at(layer.hidden, images))
    place = images.place.unsqueeze(-1).expand_as(states)
    return Reduced(into, layer.hidden.scatter(1, place, states))
