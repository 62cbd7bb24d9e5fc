"""Image tokens chosen one after another, each by those that were chosen before: what such reducers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers.staged import Depth, Dropping, Share, dropped, layers_at, per_row


@dataclass(frozen=True)
class Images:
    """The image tokens of each row, in their order.

    Attributes:
        place: which of the row's tokens each is, `[batch, images]`; rows that have fewer have others at the end.
        valid: which of them are image tokens.
        unit: their hidden states at unit length, float32.
    """

    place: Int[Tensor, "batch images"]
    valid: Bool[Tensor, "batch images"]
    unit: Float[Tensor, "batch images hidden"]

    @classmethod
    def of(cls, layer: ReductionContext) -> Images:
        """Those that have come as far, in tensors as wide as the row that had most; asks the device nothing."""
        most = max(1, min(layer.is_image.shape[1], max(layer.image_tokens)))
        place = (~layer.is_image).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        hidden = layer.hidden.gather(1, place.unsqueeze(-1).expand(-1, -1, layer.hidden.shape[2]))
        return cls(place, layer.is_image.gather(1, place), F.normalize(hidden.float(), dim=-1))


class Choosing(Dropping):
    """Base of reducers that act once, and choose image tokens one by one.

    Args:
        after: layers that have run when it acts, or a fraction of the depth; 0 before the first.
        drop: share of the image tokens that is dropped.
    """

    after: Depth = 0
    drop: Share = 0.9

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """Once."""
        return layers_at(self, (self.after,), layers)

    def share(self, stage: int) -> float:
        """What `drop` leaves."""
        return 1.0 - self.drop

    def chosen(self, layer: ReductionContext, images: Images, keep: list[int]) -> Bool[Tensor, "batch images"]:
        """Marks as many of each row's image tokens as `keep` says, all where it has no more."""
        raise NotImplementedError

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Drops what is not chosen."""
        images = Images.of(layer)
        chosen = self.chosen(layer, images, self.keep(layer)) & images.valid
        return dropped(layer, (~layer.is_image).scatter(1, images.place, chosen | ~images.valid))


def first_picked(
    images: Images, picked: list[Int[Tensor, "batch one"]], keep: list[int]
) -> Bool[Tensor, "batch images"]:
    """Marks the first of each row's image tokens in the order in which they were picked, as many as it keeps."""
    taken = torch.zeros_like(images.place)
    if picked:
        order = torch.cat(picked, 1)
        within = torch.arange(order.shape[1], device=order.device) < per_row(keep, order.device)
        taken.scatter_add_(1, order, within.long())  # rows that have no more were given one again
    return taken > 0
