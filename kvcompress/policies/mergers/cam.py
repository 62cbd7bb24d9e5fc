"""Values of evicted tokens are spread over the kept tokens that follow, by chance."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.kernels import sent
from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers.pairs import Pairs, numbers, parted, slots_at
from kvcompress.policies.registry import MERGERS

_Bits = TypeVar("_Bits", int, Tensor)


@MERGERS.register("cam")
class CaM(Merger):
    """Adds the values of evicted tokens to the kept tokens that follow, the likelier the more attention they had.

    Source: CaM ("Cache Merging for Memory-efficient LLMs Inference", ICML 2024, PMLR 235:58840-58850, and its released
    code for the reach). An evicted token of attention a is merged with the probability min(1, a / mean attention of
    the next m kept tokens); then each of these gains 1 / m of its value. Keys stay as they are. Needs a scorer of mass.

    *Deviates:* attention is the scorer's importance. Where fewer than `reach` kept tokens follow, m is their number.
    Tokens that have no score, which are those that came in decode steps, are dropped when they leave. Chance is a hash
    of seed, layer, head and the token's place in its row, so that a row's batch does not matter.

    Args:
        reach: most kept tokens that take up a share; m in the source's rule.
        seed: seed of the chance.
        decoding: whether tokens that decode steps free are merged too; if not, they are dropped.
    """

    reads_mass: ClassVar[bool] = True

    reach: int = Field(default=32, ge=1)
    seed: int = 0
    decoding: bool = True

    @property
    def merges_decoding(self) -> bool:
        """As chosen."""
        return self.decoding

    def merge(self, layer: MergeContext) -> Merged:
        """Adds up shares by the first kept slot that takes one, then over the reach."""
        if layer.importance is None:
            raise ValueError("merger cam needs importance: choose a scorer")
        (kept, is_kept), (evicted, is_evicted) = parted(layer)
        own, reach = layer.index.gather(-1, evicted), min(self.reach, kept.shape[-1])
        places = layer.index.gather(-1, kept).masked_fill(~is_kept, torch.iinfo(torch.int64).max)
        first = torch.searchsorted(places, own)
        followers = (is_kept.sum(-1, keepdim=True) - first).clamp(max=reach)

        attention = layer.importance.gather(-1, kept).double().masked_fill(~is_kept, torch.nan)
        sums, counts = (
            F.pad(t.cumsum(-1), (1, 0)) for t in (attention.nan_to_num(nan=0.0), (~attention.isnan()).double())
        )
        following = [t.gather(-1, first + followers) - t.gather(-1, first) for t in (sums, counts)]
        chance = (layer.importance.gather(-1, evicted) * following[1] / following[0]).nan_to_num(nan=0.0, posinf=1.0)
        taken = is_evicted & (followers > 0) & (self._draws(layer.layers, own, layer.first_head) < chance)

        pairs = Pairs(kept, evicted, first.clamp(max=kept.shape[-1] - 1), taken)
        values = layer.values.clone(memory_format=torch.contiguous_format)
        shares = slots_at(values, evicted).float() / followers.clamp(min=1).unsqueeze(-1)
        if layer.most_evicted == 1:  # no need to touch any slot but its followers
            within = (first - kept.shape[-1] + reach).clamp(min=0)
            offsets = torch.arange(reach, device=kept.device) - within
            followed = taken & (offsets >= 0) & (offsets < followers)
            _gain(values, kept.gather(-1, first + offsets), followed, shares)
        else:
            came = pairs.total(torch.ones_like(shares[..., 0])).unsqueeze(-1)
            changed = _window_sums(came, reach).squeeze(-1) > 0
            _gain(values, kept, changed & is_kept, _window_sums(pairs.summed(shares), reach))
        return Merged(layer.keys, values)

    def _draws(
        self, layers: tuple[int, ...], index: Int[Tensor, "batch kv_heads some"], first_head: int = 0
    ) -> Float[Tensor, "batch kv_heads some"]:
        """Numbers in [0, 1) that are as good as random, one per head and token."""
        heads = first_head + torch.arange(index.shape[1], device=index.device).unsqueeze(-1)
        seed, rows = _mixed(self.seed & 0xFFFFFFFF), len(index) // len(layers)
        starts = sent([_mixed(seed + layer) for layer in layers for _ in range(rows)], index.device).view(-1, 1, 1)
        return _mixed(_mixed(heads + starts) + index.long()) / 2.0**32


def _gain(
    values: Float[Tensor, "batch kv_heads slots dim"],
    kept: Int[Tensor, "batch kv_heads kept"],
    changed: Bool[Tensor, "batch kv_heads kept"],
    more: Float[Tensor, "batch kv_heads #kept dim"],
) -> None:
    """Adds something to the slots that are kept and gain it, in place; bit for bit as they were elsewhere."""
    before = slots_at(values, kept)
    new = torch.where(changed.unsqueeze(-1), (before.float() + more).to(values.dtype), before)
    values.flatten(0, 2).index_copy_(0, numbers(kept, values.shape[2]), new.flatten(0, 2))


def _mixed(bits: _Bits) -> _Bits:
    """A number of 32 bits that depends on every bit of the one given."""
    for _ in range(2):
        bits = (((bits >> 16) ^ bits) * 0x45D9F3B) & 0xFFFFFFFF
    return (bits >> 16) ^ bits


def _window_sums(
    tensor: Float[Tensor, "batch kv_heads slots dim"], width: int
) -> Float[Tensor, "batch kv_heads slots dim"]:
    """Sums of each slot and the `width - 1` before it, from sums over powers of two, so that nothing cancels."""

    def later(given: Tensor, slots: int) -> Tensor:
        return F.pad(given, (0, 0, slots, 0))[:, :, : given.shape[2]]

    total, done, size = torch.zeros_like(tensor), 0, 1
    while True:
        if width & size:
            total, done = total + later(tensor, done), done + size
        if done == width:
            return total
        tensor, size = tensor + later(tensor, size), 2 * size
