"""The kept key that is most like each evicted one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kvcompress.policies.context import MergeContext
from kvcompress.policies.mergers.pairs import Pairs, parted, slots_at

_GRID = 2**16  # similarities are compared in steps of 1 / 2**16
_FORBIDDEN = 4.0  # subtracted from the similarity of keys that must not be paired, more than any two can differ
_TILE_KEYS = 1024
_TILE_SIMILARITIES_CPU = 2**22
_TILE_SIMILARITIES_GPU = 2**26  # large enough to hide the launch of a kernel


@dataclass(frozen=True)
class SimilarPairs(Pairs):
    """Pairs by similarity of their keys.

    Attributes:
        rounded: cosine of the angle between the keys of each pair, on the grid on which similarities are compared.
        similarity: the same as it is; None unless asked for.
    """

    rounded: Float[Tensor, "batch kv_heads evicted"]
    similarity: Float[Tensor, "batch kv_heads evicted"] | None = None


def most_similar(layer: MergeContext, within_modality: bool, cosines: bool = False) -> SimilarPairs:
    """Pairs every evicted slot with the kept one whose key is most similar by cosine.

    Similarities are compared in steps of 2**-16 and the earlier of equal ones wins: two keys of one token at the same
    distance on either side are equally similar, and rounding must not decide between them. No more than a tile of the
    similarities exists at any time.

    Args:
        layer: the slots.
        within_modality: whether image tokens are paired with image tokens alone and text with text.
        cosines: whether the pairs' similarities are needed as they are.
    """
    (kept, is_kept), (evicted, is_evicted) = parted(layer)
    directions, marks = _directions(layer.keys), _marks(layer, within_modality)
    described, dim = torch.cat([directions, marks], -1), directions.shape[3]
    asks, answers = slots_at(described, evicted), slots_at(described, kept)
    # What marks an evicted slot meets, in the product, what forbids a kept one to be paired with it.
    answers[..., dim:].sub_(1).mul_(_FORBIDDEN).masked_fill_(~is_kept.unsqueeze(-1), -_FORBIDDEN)
    rounded, target = _best(asks * _GRID, answers)
    taken = is_evicted & (rounded > -_FORBIDDEN / 2)
    pairs = SimilarPairs(kept, evicted, target, taken, rounded)
    if cosines:
        similarity = (asks[..., :dim] * slots_at(answers, target)[..., :dim]).sum(-1)
        pairs = replace(pairs, similarity=similarity)
    if layer.most_evicted > 1:
        return pairs
    return replace(pairs, kept=kept.gather(-1, target), target=torch.zeros_like(target))  # the only one to change


def _directions(keys: Float[Tensor, "batch kv_heads slots dim"]) -> Float[Tensor, "batch kv_heads slots dim"]:
    """Keys of length one, in float32."""
    keys = keys.float()
    length: Tensor = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    return keys / length.clamp_(min=1e-12)


def _marks(layer: MergeContext, within_modality: bool) -> Float[Tensor, "batch kv_heads slots kinds"]:
    """One for the kind that a slot is of, zero for the other; a single kind where all are alike."""
    if not within_modality or layer.is_image is None:
        return torch.ones((), dtype=torch.float32, device=layer.keys.device).expand(*layer.kept.shape, 1)
    return torch.stack([~layer.is_image, layer.is_image], -1).float()


def _best(
    evicted: Float[Tensor, "batch kv_heads evicted dim"], kept: Float[Tensor, "batch kv_heads kept dim"]
) -> tuple[Tensor, Tensor]:
    """Highest product of each evicted slot, rounded and divided by the grid, and the first kept one that has it."""
    shape, evicted, kept = evicted.shape[:3], evicted.flatten(0, 1), kept.flatten(0, 1)
    most = _TILE_SIMILARITIES_CPU if kept.device.type == "cpu" else _TILE_SIMILARITIES_GPU
    step = min(1024, max(64, most // (len(evicted) * min(_TILE_KEYS, kept.shape[1]))))
    found = [_best_of_tiles(evicted[:, first : first + step], kept) for first in range(0, evicted.shape[1], step)]
    best, target = found[0] if len(found) == 1 else (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return (best / _GRID).view(shape), target.view(shape)


def _best_of_tiles(
    evicted: Float[Tensor, "rows evicted dim"], kept: Float[Tensor, "rows kept dim"]
) -> tuple[Tensor, Tensor]:
    """The highest rounded product of each evicted slot, and the first kept one that has it, a tile at a time."""
    best, target = _best_of_tile(evicted, kept[:, :_TILE_KEYS])
    for left in range(_TILE_KEYS, kept.shape[1], _TILE_KEYS):
        highest, at = _best_of_tile(evicted, kept[:, left : left + _TILE_KEYS])
        better = highest > best
        best, target = torch.where(better, highest, best), torch.where(better, at + left, target)
    return best, target


def _best_of_tile(
    evicted: Float[Tensor, "rows evicted dim"], kept: Float[Tensor, "rows kept dim"]
) -> tuple[Tensor, Tensor]:
    highest, at = torch.bmm(evicted, kept.transpose(1, 2)).round_().max(dim=-1)
    return highest, at
