"""Evicted slots paired with the kept ones that take them up, and what the kept ones then hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.policies.context import MergeContext


def in_order(
    mask: Bool[Tensor, "batch kv_heads slots"], index: Int[Tensor, "batch kv_heads slots"], most: int
) -> tuple[Int[Tensor, "batch kv_heads marked"], Bool[Tensor, "batch kv_heads marked"]]:
    """Positions of the marked slots, in the order of their tokens.

    Args:
        mask: marked slots.
        index: number of tokens of the row before each slot's token.
        most: at least the number of marked slots of any row and head.

    Returns:
        At least one position per row and head, and which of them are marked: those come first.
    """
    latest = torch.iinfo(index.dtype).max
    positions = index.masked_fill(~mask, latest).argsort(dim=-1, stable=True)[..., : max(1, most)]
    return positions, mask.gather(-1, positions)


def slots_at(
    tensor: Float[Tensor, "batch kv_heads slots dim"], positions: Int[Tensor, "batch kv_heads some"]
) -> Float[Tensor, "batch kv_heads some dim"]:
    """The slots at some positions, in float32."""
    return tensor[_indices(positions)].float()


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

    @property
    def count(self) -> Float[Tensor, "batch kv_heads kept"]:
        """Evicted slots that each kept one takes up."""
        return self.total(torch.ones(1, 1, 1, dtype=torch.float32, device=self.kept.device))

    def fold(
        self,
        tensor: Float[Tensor, "batch kv_heads slots dim"],
        own: Float[Tensor, "#batch #kv_heads #kept"],
        weight: Float[Tensor, "#batch #kv_heads #evicted"],
        divisor: Float[Tensor, "#batch #kv_heads #kept"],
    ) -> Float[Tensor, "batch kv_heads slots dim"]:
        """Gives every kept slot `(own * itself + the sum of weight * evicted) / divisor`, added up in float32.

        Args:
            tensor: keys or values of all slots.
            own: weight of a kept slot itself.
            weight: weight of an evicted slot.
            divisor: what their sum is divided by.

        Returns:
            All slots, in the dtype they came in; those that take up nothing are as they were.
        """
        summed = self.summed(slots_at(tensor, self.evicted) * weight.unsqueeze(-1))
        summed.addcmul_(slots_at(tensor, self.kept), own.unsqueeze(-1)).div_(divisor.unsqueeze(-1))
        return written(tensor, self.kept, self.count > 0, summed)

    def summed(self, evicted: Float[Tensor, "batch kv_heads evicted dim"]) -> Float[Tensor, "batch kv_heads kept dim"]:
        """Rows of the evicted slots that are taken up, added up for each kept one."""
        batch, kv_heads, kept = self.kept.shape
        head = torch.arange(batch * kv_heads, device=evicted.device).view(batch, kv_heads, 1)
        rows, dim = (head * kept + self.target).flatten(), evicted.shape[3]
        evicted = evicted.masked_fill(~self.taken.unsqueeze(-1), 0.0)
        summed = evicted.new_zeros(batch * kv_heads * kept, dim).index_add_(0, rows, evicted.view(-1, dim))
        return summed.view(batch, kv_heads, kept, dim)


def written(
    tensor: Float[Tensor, "batch kv_heads slots dim"],
    kept: Int[Tensor, "batch kv_heads kept"],
    changed: Bool[Tensor, "batch kv_heads kept"],
    new: Float[Tensor, "batch kv_heads kept dim"],
) -> Float[Tensor, "batch kv_heads slots dim"]:
    """All slots with new contents at the kept positions that changed, bit for bit as they were elsewhere."""
    at, result = _indices(kept), tensor.clone()
    result[at] = torch.where(changed.unsqueeze(-1), new.to(tensor.dtype), tensor[at])
    return result


def _indices(positions: Int[Tensor, "batch kv_heads some"]) -> tuple[Tensor, Tensor, Tensor]:
    """What picks whole slots, which is several times faster than a gather of their numbers."""
    batch, kv_heads, _ = positions.shape
    rows, heads = torch.arange(batch, device=positions.device), torch.arange(kv_heads, device=positions.device)
    return rows[:, None, None], heads[:, None], positions


def nearest(layer: MergeContext) -> Pairs:
    """Pairs every evicted slot with the kept one that is the fewest tokens away, the earlier of two."""
    kept, is_kept = in_order(layer.kept, layer.index, layer.most_kept)
    evicted, is_evicted = in_order(layer.evicted, layer.index, layer.most_evicted)
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
