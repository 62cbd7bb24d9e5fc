"""Up to half of a window's tokens merged into the most similar ones of the other half."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.kernels import sent, sent_together
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
    window: Int[np.ndarray, "batch tokens"],
    weight: Float[Tensor, "batch tokens"],
    share: float,
) -> Reduced:
    """Merges tokens of each window pairwise (ToMe, arXiv 2210.09461, section 3; LightKV, arXiv 2605.00789).

    Of a window's n tokens in order, the even ones each look for the odd one with the smallest feature divergence,
    1 - cosine (the first among equals). The min(floor(share n), floor(n / 2)) closest of them are merged: the odd token
    becomes the weighted mean of itself and of all that came to it. All windows of all rows are treated at once, each as
    wide as the widest.

    Args:
        hidden: states of all tokens.
        window: window of each token in its row, as the host knows it; tokens at -1 stay as they are.
        weight: non-negative weight of each token; where all that meet weigh nothing, they weigh the same.
        share: of each window's tokens that is merged into others, at most a half.
    """
    (batch, tokens), nobody, device = hidden.shape[:2], window.size, hidden.device
    every, windows = np.arange(nobody + 1) % tokens, _Windows.of(window, share)
    if not windows.counts.size:
        return Reduced(sent(every[:nobody].reshape(batch, tokens), device), hidden)
    places, slots = windows.places(nobody), np.arange(windows.token.shape[1])
    partners = np.pad(windows.token[:, 1::2] % tokens, ((0, 0), (0, 1)))  # after the last stands nobody
    arrays = [every, windows.token, places[:, ::2], places[:, 1::2], partners, slots, windows.most[:, None]]
    into, at, even, odd, names, number, most = sent_together(arrays, device)

    states = hidden.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, -1).float()
    length = torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12)
    likeness = states[:, ::2] @ states[:, 1::2].transpose(1, 2)
    likeness = likeness / (length[:, ::2, None] * length[:, None, 1::2])
    if windows.ragged:
        likeness = likeness.masked_fill((odd == nobody).unsqueeze(1), -torch.inf)
    closest, partner = likeness.max(-1)
    if windows.ragged or windows.chosen:
        closest = closest.masked_fill(even == nobody, -torch.inf)
        order, last = closest.argsort(dim=-1, descending=True, stable=True), number[: even.shape[1]] >= most
        stays = torch.empty_like(last).scatter_(1, order, last)
        partner, even = partner.masked_fill(stays, odd.shape[1]), even.masked_fill(stays, nobody)
    into = into.index_copy_(0, even.flatten(), names.gather(1, partner).flatten())[:-1].view(batch, tokens)

    weights = weight.flatten().float().clamp(min=1e-30).index_select(0, at.flatten()).view(*at.shape, 1)
    comes = (partner.unsqueeze(1) == number[: odd.shape[1], None]).float()  # [windows, odd, even]
    weighted, own = states * weights, weights[:, 1::2]
    sums = torch.baddbmm(weighted[:, 1::2], comes, weighted[:, ::2])
    total = torch.baddbmm(own, comes, weights[:, ::2])
    mean = torch.where(total > own, sums / total, states[:, 1::2]).to(hidden.dtype)
    changed = torch.cat([hidden.flatten(0, 1), mean[0, :1]]).index_copy_(0, odd.flatten(), mean.flatten(0, 1))
    return Reduced(into, changed[:-1].view_as(hidden))


class _Windows(NamedTuple):
    """The windows of all rows in which something is merged.

    Attributes:
        token: tokens of each in order, `[windows, slots]`, counted through all rows; any after a window's last.
        counts: how many tokens each has.
        most: how many of them are merged into others.
    """

    token: Int[np.ndarray, "windows slots"]
    counts: Int[np.ndarray, " windows"]
    most: Int[np.ndarray, " windows"]

    @classmethod
    def of(cls, window: Int[np.ndarray, "batch tokens"], share: float) -> _Windows:
        """Those of tokens whose windows are known."""
        names = window + (1 + window.max(initial=-1)) * np.arange(len(window))[:, None]
        inside = np.flatnonzero(window >= 0)
        named = names.ravel()[inside]
        counts, order = np.bincount(named), inside[named.argsort(kind="stable")]
        starts, most = counts.cumsum() - counts, np.minimum(np.floor(counts * share + 1e-6), counts // 2).astype(int)
        starts, counts, most = (array[most > 0] for array in (starts, counts, most))
        slots = starts[:, None] + np.arange(counts.max(initial=0))
        return cls(order[np.minimum(slots, len(order) - 1)], counts, most)

    def places(self, nobody: int) -> Int[np.ndarray, "windows slots"]:
        """`token`, with `nobody` after a window's last."""
        return np.where(np.arange(self.token.shape[1]) < self.counts[:, None], self.token, nobody)

    @property
    def ragged(self) -> bool:
        """Whether some have fewer tokens than others."""
        return bool((self.counts != self.token.shape[1]).any())

    @property
    def chosen(self) -> bool:
        """Whether some have even tokens that stay."""
        return bool((self.most < (self.counts + 1) // 2).any())
