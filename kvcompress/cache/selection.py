"""Which slots of a layer stay, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.allocation import protection
from kvcompress.cache.sequence import Sequence
from kvcompress.config import CompressionConfig
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Evictor, Merger, Scorer
from kvcompress.policies.context import AllocationContext, MergeContext, Merged, SelectionContext
from kvcompress.policies.faults import policy_errors

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer

Ranked: TypeAlias = tuple[Tensor, Tensor | None]  # token index and importance of a layer's slots, over all heads


def importance_of(scorer: Scorer, scores: Tensor, index: Tensor, sequence: Sequence, layer: int) -> Tensor:
    """Importance of every slot of a layer; NaN where a token came after the last step that scored, 0 in empty slots."""
    importance = scores
    if type(scorer).importance is not Scorer.importance:
        with policy_errors(scorer, layer):
            importance = scorer.importance(scores, sequence.queries_on(index, last=not scorer.accumulates, layer=layer))
    if (sequence.scored.end < sequence.row_seen).any():
        importance = importance.masked_fill(sequence.unscored(index), torch.nan)
    return importance.masked_fill(index < 0, 0.0)


def without_unknown(importance: Tensor) -> Tensor:
    """Importance in which slots without a score rank with the highest."""
    unknown = importance.isnan()
    highest = importance.masked_fill(unknown, -torch.inf).amax(-1, keepdim=True)
    return torch.where(unknown, highest.masked_fill(highest == -torch.inf, 0.0), importance)


def gather_importance(
    layers: List[CompressedLayer], config: CompressionConfig, sequence: Sequence, ranked: List[Ranked]
) -> tuple[Tensor, AllocationContext]:
    """Head-mean importance of every layer on one device, padded to the longest layer, with what belongs to it."""
    slots, device = max(index.shape[2] for index, _ in ranked), ranked[-1][0].device
    means, indices = [], []
    for index, score in ranked:
        if score is None:
            score = torch.zeros(index.shape[0], 1, index.shape[2], device=index.device, dtype=torch.float32)
        elif index.shape[1] > 1:
            score = _rank_by_rank(score, index, sequence.images_at(index))
        means.append(_padded(score.mean(1), slots, 0.0).to(device))
        indices.append(_padded(index[:, 0], slots, -1).to(device))
    every = torch.stack(indices)
    flat = every.transpose(0, 1)  # [batch, layers, slots], as if layers were sets
    images, protected = sequence.images_at(flat), sequence.protected(flat, *protection(config))
    context = AllocationContext(
        valid=every >= 0,
        is_image=None if images is None else images.transpose(0, 1),
        statistics={
            name: torch.stack([layer.statistics[name].to(device) for layer in layers])
            for name in config.allocator.needs
        },
        protected=protected.transpose(0, 1),
    )
    return torch.stack(means), context


def _padded(tensor: Tensor, slots: int, fill: float) -> Tensor:
    return tensor if tensor.shape[-1] == slots else F.pad(tensor, (0, slots - tensor.shape[-1]), value=fill)


def _rank_by_rank(score: Tensor, index: Tensor, images: Tensor | None) -> Tensor:
    """Mean importance over heads that hold different tokens, where the best of each head count as one token, and so on.

    Image tokens are ranked apart from text. The mean of a rank stands where the first head has the token of that rank.
    """
    kind = (index < 0).long() * 2 - (0 if images is None else images.long())
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))
    ranked = score.gather(-1, order).mean(1, keepdim=True)
    return torch.zeros_like(ranked).scatter_(-1, order[:, :1], ranked)


def checked_selection(evictor: Evictor, layer: int, context: SelectionContext) -> tuple[Tensor, Tensor]:
    """Which slots stay, `[batch, sets, slots]`, and a flag on the device: whether the answer breaks the contract.

    Raises:
        PolicyError: if the answer has the wrong shape or dtype.
    """
    sets = (1, context.valid.shape[1], 0 if context.importance is None else context.importance.shape[1])
    batch, _, slots = context.valid.shape
    with policy_errors(evictor, layer):
        mask = evictor.select(context)
        fits = mask.dtype == torch.bool and mask.ndim == 3
    if not fits or mask.shape[1] not in sets or mask.shape[::2] != (batch, slots):
        raise PolicyError(
            f"evictor {evictor.name}: layer {layer}: select must return bool [{batch}, 1 or kv_heads, {slots}], got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    wrong = (mask.sum(-1) != context.budget[:, None]).any() | (mask & ~context.valid).any()
    return mask, wrong


def selection_message(evictor: Evictor, layer: int, mask: Tensor, context: SelectionContext) -> str:
    """What is wrong with an evictor's answer, once it is known that something is."""
    return (
        f"evictor {evictor.name}: layer {layer}: select must mark as many slots as the budget "
        f"({context.budget.tolist()} per row), none of them empty; got {mask.sum(-1).tolist()}"
    )


def order_of(mask: Tensor, index: Tensor, kept: int, ordered: bool) -> Tensor:
    """Slots that stay, in the order of their tokens; where a row has fewer than `kept`, any slot in their place.

    Args:
        mask: slots that stay, `[batch, sets, slots]`.
        index: token index of every slot, of as many sets or one.
        kept: slots that stay in the row that keeps most.
        ordered: whether slots lie in the order of their tokens, so that no sort is needed.
    """
    if not ordered:
        latest = torch.iinfo(index.dtype).max
        return torch.where(mask, index, latest).argsort(dim=-1)[..., :kept]
    place = torch.where(mask, mask.cumsum(-1) - 1, kept).clamp_(max=kept)  # too many marked is told later
    slots = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    order = torch.zeros((*mask.shape[:2], kept + 1), dtype=torch.int64, device=mask.device)
    return order.scatter_(-1, place, slots)[..., :kept]


def merged(merger: Merger, layer: int, context: MergeContext) -> Merged:
    """What a merger makes of a layer.

    Raises:
        PolicyError: if keys or values come back in another shape or dtype.
    """
    with policy_errors(merger, layer):
        result = merger.merge(context)
        pairs = (("keys", context.keys, result.keys), ("values", context.values, result.values))
    for name, before, after in pairs:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise PolicyError(
                f"merger {merger.name}: layer {layer}: must return {name} as {before.dtype} {tuple(before.shape)}, got "
                f"{after.dtype} {tuple(after.shape)}"
            )
    return result
