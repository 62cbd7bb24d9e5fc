"""Up to half of a window's tokens merged into the most similar ones of the other half."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import Reduced
from kvcompress.policies.reducers.staged import Depth, layers_at

_FRACTIONS = (0.375, 0.5625, 0.75)  # of the depth; LightKV's 12, 18 and 24 of 32 layers
_PUBLISHED = {40: (15, 23, 31)}  # where LightKV's are others


class Bipartite(Reducer):
    """Base of reducers that merge up to half of an image's tokens into the other half, in stages."""

    after: tuple[Depth, ...] | None = None
    rho: float = Field(default=0.5, ge=0.0, le=1.0)
    vision_retention: float | None = Field(default=None, gt=0.0, le=1.0)

    def model_post_init(self, context: object) -> None:
        """Checks that the layers are given in one way alone."""
        if self.after is not None and self.vision_retention is not None:
            raise ConfigError(
                f"reducer {self.name}: after and vision_retention both say where it acts; give one of them"
            )

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """The layers in `after`, those that come closest to `vision_retention`, or LightKV's."""
        if self.vision_retention is not None:
            return self._closest(layers)
        published: tuple[int | float, ...] = _PUBLISHED.get(layers, _FRACTIONS)
        return layers_at(self.name, published if self.after is None else self.after, layers)

    def _closest(self, layers: int) -> tuple[int, ...]:
        """Three layers at equal distances, no further apart than LightKV's, or fewer."""
        gaps = range(max(1, round(layers * (_FRACTIONS[1] - _FRACTIONS[0]))), 0, -1)
        plans = [
            tuple(n for n in (a, a + gap, a + 2 * gap) if n < layers) for gap in gaps for a in range(1, layers + 1)
        ]
        return min(plans, key=lambda plan: abs(self._average(plan, layers) - (self.vision_retention or 0.0)))

    def _average(self, plan: tuple[int, ...], layers: int) -> float:
        """Image tokens per layer, as a share, where every window has an even number of them."""
        ends, share = (*plan, layers), 1.0 - min(self.rho, 0.5)
        return sum((end - start) * share**stage for stage, (start, end) in enumerate(pairwise((0, *ends)))) / layers


def merge_in_windows(
    hidden: Float[Tensor, "tokens hidden"],
    window: Int[Tensor, " tokens"],
    weight: Float[Tensor, " tokens"],
    share: float,
) -> Reduced:
    """Merges tokens of each window pairwise (ToMe, arXiv 2210.09461, section 3; LightKV, arXiv 2605.00789).

    Of a window's n tokens in order, the even ones each look for the odd one with the smallest feature divergence,
    1 - cosine (the first among equals). The min(floor(share n), floor(n / 2)) closest of them are merged: the odd token
    becomes the weighted mean of itself and of all that came to it. All windows are treated at once.

    Args:
        hidden: states of all tokens of a row.
        window: window of each token; tokens at -1 stay as they are.
        weight: non-negative weight of each token; where all that meet weigh nothing, they weigh the same.
        share: of each window's tokens that is merged into others, at most a half.
    """
    device, own = hidden.device, torch.arange(len(hidden), device=hidden.device)
    inside = (window >= 0).nonzero().flatten()
    inside = inside[window[inside].argsort(stable=True)]  # window by window, in order within each
    names, counts = torch.unique_consecutive(window[inside], return_counts=True)
    if not len(names):
        return Reduced(own, hidden)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(inside), device=device) - first.repeat_interleave(counts)
    number = torch.arange(len(names), device=device).repeat_interleave(counts)
    table = torch.full((len(names), int(counts.max()) + 1), -1, device=device)  # at least one odd column
    table[number, place] = inside
    even, odd = table[:, ::2], table[:, 1::2]

    unit = F.normalize(hidden.float(), dim=-1)
    likeness = unit[even] @ unit[odd].transpose(1, 2)
    likeness = likeness.masked_fill((odd < 0).unsqueeze(1), -torch.inf)
    closest, partner = likeness.max(-1)
    closest = closest.masked_fill(even < 0, -torch.inf)
    most = torch.minimum((counts.double() * share + 1e-6).floor().long(), counts // 2)
    rank = torch.empty_like(partner)
    order = closest.argsort(dim=-1, descending=True, stable=True)
    rank.scatter_(1, order, torch.arange(even.shape[1], device=device).expand_as(order))
    merged = rank < most.unsqueeze(1)

    sources, targets = even[merged], odd.gather(1, partner)[merged]
    into = own.clone()
    into[sources] = targets
    if not len(sources):
        return Reduced(into, hidden)
    weight = weight.float().clamp(min=1e-30).unsqueeze(-1)
    taking = torch.unique(targets)
    total = weight.index_add(0, targets, weight[sources])
    mean = (weight * hidden.float()).index_add(0, targets, weight[sources] * hidden[sources].float()) / total
    changed = hidden.clone()
    changed[taking] = mean[taking].to(hidden.dtype)
    return Reduced(into, changed)
