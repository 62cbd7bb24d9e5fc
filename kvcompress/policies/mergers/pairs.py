"""Evicted slots paired with the kept ones that take them up, and what the kept ones then hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.policies.context import MergeContext


class Marked(NamedTuple):
    """Some slots of every row and head, in the order of their tokens.

    Attributes:
        positions: where they are; at least one per row and head.
        valid: which of these positions are of such slots: those come first.
    """

    positions: Int[Tensor, "batch kv_heads marked"]
    valid: Bool[Tensor, "batch kv_heads marked"]


def parted(layer: MergeContext) -> tuple[Marked, Marked]:
    """The slots that stay and those that go."""
    masks, latest = torch.stack([layer.kept, layer.evicted]), torch.iinfo(layer.index.dtype).max
    positions = layer.index.masked_fill(~masks, latest).argsort(dim=-1, stable=True)
    valid, most = masks.gather(-1, positions), (max(1, layer.most_kept), max(1, layer.most_evicted))
    kept, evicted = (Marked(positions[side, ..., :n], valid[side, ..., :n]) for side, n in enumerate(most))
    return kept, evicted


def numbers(positions: Int[Tensor, "batch kv_heads some"], slots: int) -> Int[Tensor, " all"]:
    """Positions as numbers among the slots of all rows and heads, of which each has so many."""
    batch, kv_heads, _ = positions.shape
    first = torch.arange(0, batch * kv_heads * slots, slots, device=positions.device)
    return (positions + first.view(batch, kv_heads, 1)).flatten()


def slots_at(
    tensor: Float[Tensor, "batch kv_heads slots dim"], positions: Int[Tensor, "batch kv_heads some"]
) -> Float[Tensor, "batch kv_heads some dim"]:
    """A copy of the slots at some positions; whole slots are picked several times faster than a gather would."""
    picked = tensor.flatten(0, 2).index_select(0, numbers(positions, tensor.shape[2]))
    return picked.view(*positions.shape, -1)


@dataclass(frozen=True)
class Pairs:
    """Which kept slot takes up each evicted one.

    Attributes:
        kept: positions of the kept slots, in the order of their tokens.
        evicted: positions of the evicted slots, likewise.
        target: for each evicted slot, which of `kept` is its own.
        taken: evicted slots that are taken up; the others are dropped.
    """

    kept: Int[Tensor, "batch kv_heads kept"]
    evicted: Int[Tensor, "batch kv_heads evicted"]
    target: Int[Tensor, "batch kv_heads evicted"]
    taken: Bool[Tensor, "batch kv_heads evicted"]

    def total(self, weight: Float[Tensor, "#batch #kv_heads #evicted"]) -> Float[Tensor, "batch kv_heads kept"]:
        """Weights of the evicted slots, added up for each kept one."""
        weight = torch.where(self.taken, weight, 0.0)
        return weight.new_zeros(self.kept.shape).scatter_add_(-1, self.target, weight)

    def fold(
        self,
        layer: MergeContext,
        own: Float[Tensor, "#batch #kv_heads #kept"],
        weight: Float[Tensor, "#batch #kv_heads #evicted"],
        divisor: Float[Tensor, "batch kv_heads kept"],
    ) -> tuple[Float[Tensor, "batch kv_heads slots head_dim"], Float[Tensor, "batch kv_heads slots value_dim"]]:
        """Gives every kept slot `(own * itself + the sum of weight * evicted) / divisor`, added up in float32.

        Args:
            layer: keys and values of all slots.
            own: weight of a kept slot itself.
            weight: weight of an evicted slot.
            divisor: what their sum is divided by; where it is `own`, nothing came.

        Returns:
            Keys and values of all slots, in the dtype they came in; those that take up nothing are as they were.
        """
        both = torch.cat([layer.keys, layer.values], -1)
        slots, at = both.flatten(0, 2), numbers(self.kept, both.shape[2])
        before = slots.index_select(0, at).view(*self.kept.shape, -1)
        summed = self.summed(slots_at(both, self.evicted).float().mul_(weight.unsqueeze(-1)))
        summed.addcmul_(before.float(), own.unsqueeze(-1)).div_(divisor.unsqueeze(-1))
        new = torch.where((divisor != own).unsqueeze(-1), summed.to(both.dtype), before)
        slots.index_copy_(0, at, new.flatten(0, 2))
        dim = layer.keys.shape[3]
        return both[..., :dim], both[..., dim:]

    def summed(self, evicted: Float[Tensor, "batch kv_heads evicted dim"]) -> Float[Tensor, "batch kv_heads kept dim"]:
        """Rows of the evicted slots that are taken up, added up for each kept one."""
        evicted, (batch, kv_heads, kept) = evicted.masked_fill(~self.taken.unsqueeze(-1), 0.0), self.kept.shape
        summed = evicted.new_zeros(batch * kv_heads * kept, evicted.shape[3])
        summed.index_add_(0, numbers(self.target, kept), evicted.flatten(0, 2))
        return summed.view(batch, kv_heads, kept, -1)


def nearest(layer: MergeContext) -> Pairs:
    """Pairs every evicted slot with the kept one that is the fewest tokens away, the earlier of two."""
    (kept, is_kept), (evicted, is_evicted) = parted(layer)
    far = torch.iinfo(torch.int32).max
    places = layer.index.gather(-1, kept).masked_fill(~is_kept, 2 * far)
    own = layer.index.gather(-1, evicted)
    after = torch.searchsorted(places, own)
    last = kept.shape[-1] - 1
    before = (after - 1).clamp(min=0)
    ahead = places.gather(-1, after.clamp(max=last)) - own
    ahead = ahead.masked_fill(after > last, far)
    behind = (own - places.gather(-1, before)).masked_fill(after == 0, far)
    target = torch.where(behind <= ahead, before, after.clamp(max=last))
    return Pairs(kept, evicted, target, is_evicted & (torch.minimum(ahead, behind) < far))
