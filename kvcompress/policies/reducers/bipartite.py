"""Up to half of a window's tokens merged into the most similar ones of the other half."""

from __future__ import annotations

from itertools import pairwise

import torch
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
        return layers_at(self, published if self.after is None else self.after, layers)

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
    hidden: Float[Tensor, "batch tokens hidden"],
    window: Int[Tensor, "batch tokens"],
    weight: Float[Tensor, "batch tokens"],
    share: float,
    windows: int,
    largest: int,
) -> Reduced:
    """Merges tokens of each window pairwise (ToMe, arXiv 2210.09461, section 3; LightKV, arXiv 2605.00789).

    Of a window's n tokens in order, the even ones each look for the odd one with the smallest feature divergence,
    1 - cosine (the first among equals). The min(floor(share n), floor(n / 2)) closest of them are merged: the odd token
    becomes the weighted mean of itself and of all that came to it. All windows of all rows are treated at once, each as
    wide as the widest may be, so that nothing is asked of the device.

    Args:
        hidden: states of all tokens.
        window: window of each token in its row; tokens at -1 stay as they are.
        weight: non-negative weight of each token; where all that meet weigh nothing, they weigh the same.
        share: of each window's tokens that is merged into others, at most a half.
        windows: at least the number of windows of any row.
        largest: at least the number of tokens of any window.
    """
    (batch, tokens), device = window.shape, window.device
    slots = torch.arange(max(2, min(largest, tokens)), device=device)
    table, counts = _by_window(window, windows, slots)
    missing = slots >= counts.unsqueeze(-1)
    at = table  # among the tokens of all rows
    if batch > 1:
        at = table + torch.arange(0, batch * tokens, tokens, device=device).view(-1, 1, 1)
    places = at.masked_fill(missing, batch * tokens)  # the last place is nobody's
    (even, odd), (even_missing, odd_missing) = _halves(table), _halves(missing)
    (even_places, odd_places), width = _halves(places), len(slots) // 2

    states = hidden.flatten(0, 1).index_select(0, at.flatten()).view(*table.shape, -1).float()
    length = torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12)
    (even_states, odd_states), (even_length, odd_length) = _halves(states), _halves(length)
    likeness = even_states @ odd_states.transpose(2, 3)
    likeness = likeness / (even_length.unsqueeze(3) * odd_length.unsqueeze(2))
    closest, partner = likeness.masked_fill(odd_missing.unsqueeze(2), -torch.inf).max(-1)
    order = closest.masked_fill(even_missing, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    first = slots[: order.shape[2]] < _most(counts, share).unsqueeze(-1)
    merged = torch.empty_like(first).scatter_(2, order, first)

    into = torch.arange(batch * tokens + 1, device=device) % tokens
    target = torch.where(merged, odd.gather(2, partner), even)
    into = into.index_copy_(0, even_places.flatten(), target.flatten())[:-1].view(batch, tokens)

    weights = weight.float().clamp(min=1e-30).gather(1, table.flatten(1)).view(*table.shape, 1)
    comes = partner.unsqueeze(2) == slots[:width].unsqueeze(1)
    comes = (comes & merged.unsqueeze(2)).float()  # [batch, windows, odd, even]
    (even_weights, odd_weights), (even_weighted, odd_weighted) = _halves(weights), _halves(states * weights)
    added = comes @ even_weights
    mean = (odd_weighted + comes @ even_weighted) / (odd_weights + added)
    mean = torch.where(added > 0, mean, odd_states).to(hidden.dtype)
    changed = torch.cat([hidden.flatten(0, 1), mean[0, 0, :1]])
    changed = changed.index_copy_(0, odd_places.flatten(), mean.flatten(0, 2))
    return Reduced(into, changed[:-1].view_as(hidden))


def _halves(of_slots: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd ones of each window's slots, of a tensor `[batch, windows, slots, ...]`."""
    return of_slots[:, :, ::2], of_slots[:, :, 1::2]


def _most(counts: Int[Tensor, "batch windows"], share: float) -> Int[Tensor, "batch windows"]:
    """How many tokens of each window are merged into others: that share of them, at most a half."""
    if share >= 0.5:
        return counts // 2
    return torch.minimum((counts.double() * share + 1e-6).floor().long(), counts // 2)


def _by_window(
    window: Int[Tensor, "batch tokens"], windows: int, slots: Int[Tensor, " largest"]
) -> tuple[Int[Tensor, "batch windows largest"], Int[Tensor, "batch windows"]]:
    """Tokens of each window in order, and how many there are; what follows them in a window means nothing."""
    names, order = window.sort(dim=1, stable=True)
    starts = torch.arange(windows + 1, device=window.device).repeat(len(window), 1)
    start = torch.searchsorted(names, starts)
    place = start[:, :-1, None] + slots
    table = order.gather(1, place.clamp(max=window.shape[1] - 1).flatten(1)).view(place.shape)
    return table, start.diff(dim=1)
