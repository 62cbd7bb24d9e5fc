"""The kept key that is most like each evicted one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvcompress.policies.context import MergeContext
from kvcompress.policies.mergers.pairs import Pairs, in_order, slots_at

_GRID = 2**16  # similarities are compared in steps of 1 / 2**16
_FORBIDDEN = 4.0  # subtracted from the similarity of keys that must not be paired, more than any two can differ
_TILE_KEYS = 1024
_TILE_SIMILARITIES = 2**22


@dataclass(frozen=True)
class SimilarPairs(Pairs):
    """Pairs by similarity of their keys.

    Attributes:
        similarity: cosine of the angle between the keys of each pair.
        rounded: the same on the grid on which similarities are compared.
    """

    similarity: Float[Tensor, "batch kv_heads evicted"]
    rounded: Float[Tensor, "batch kv_heads evicted"]


def most_similar(layer: MergeContext, within_modality: bool) -> SimilarPairs:
    """Pairs every evicted slot with the kept one whose key is most similar by cosine.

    Similarities are compared in steps of 2**-16 and the earlier of equal ones wins: two keys of one token at the same
    distance on either side are equally similar, and rounding must not decide between them. No more than a tile of the
    similarities exists at any time.

    Args:
        layer: the slots.
        within_modality: whether image tokens are paired with image tokens alone and text with text.
    """
    kept, is_kept = in_order(layer.kept, layer.index, layer.most_kept)
    evicted, is_evicted = in_order(layer.evicted, layer.index, layer.most_evicted)
    kept_keys = F.normalize(slots_at(layer.keys, kept), dim=-1)
    evicted_keys = F.normalize(slots_at(layer.keys, evicted), dim=-1)
    # Two more dimensions, one for either modality of the evicted, bring what forbids a pair into the product.
    forbidden, modality = [~is_kept, ~is_kept], torch.zeros_like(is_evicted)
    if within_modality and layer.is_image is not None:
        modality, image = layer.is_image.gather(-1, evicted), layer.is_image.gather(-1, kept)
        forbidden = [~is_kept | image, ~is_kept | ~image]
    allowed = torch.stack(forbidden, dim=-1) * -_FORBIDDEN
    chosen = torch.stack([~modality, modality], dim=-1).float()
    rounded, target = _best(torch.cat([evicted_keys, chosen], -1) * _GRID, torch.cat([kept_keys, allowed], -1))
    similarity = (evicted_keys * slots_at(kept_keys, target)).sum(-1)
    taken = is_evicted & (rounded > -_FORBIDDEN / 2)
    pairs = SimilarPairs(kept, evicted, target, taken, similarity, rounded)
    if layer.most_evicted > 1:
        return pairs
    return replace(pairs, kept=kept.gather(-1, target), target=torch.zeros_like(target))  # the only one to change


def _best(
    evicted: Float[Tensor, "batch kv_heads evicted dim"], kept: Float[Tensor, "batch kv_heads kept dim"]
) -> tuple[Tensor, Tensor]:
    """Highest product of each evicted slot, rounded and divided by the grid, and the first kept one that has it."""
    shape, evicted, kept = evicted.shape[:3], evicted.flatten(0, 1), kept.flatten(0, 1)
    rows, count, _ = evicted.shape
    best = torch.full((rows, count), -torch.inf, dtype=torch.float32, device=kept.device)
    target = torch.zeros(rows, count, dtype=torch.long, device=kept.device)
    keys = min(_TILE_KEYS, kept.shape[1])
    step = min(1024, max(64, _TILE_SIMILARITIES // (rows * keys)))
    for first in range(0, count, step):
        block = slice(first, first + step)
        for left in range(0, kept.shape[1], keys):
            tile = torch.bmm(evicted[:, block], kept[:, left : left + keys].transpose(1, 2)).round_()
            highest, at = tile.max(dim=-1)
            better = highest > best[:, block]
            best[:, block] = torch.where(better, highest, best[:, block])
            target[:, block] = torch.where(better, at + left, target[:, block])
    return (best / _GRID).view(shape), target.view(shape)
