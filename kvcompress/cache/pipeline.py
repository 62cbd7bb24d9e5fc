"""The data flow: score -> allocate -> select -> keep, a line a stage."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.allocation import Allocation, allocate, protection
from kvcompress.cache.importance import Ranked, every_head
from kvcompress.cache.selection import shrink
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.policies.context import AllocationContext


def compress(
    stores: List[DenseStore], config: CompressionConfig, sequence: Sequence, statistics: List[dict[str, Tensor]]
) -> Allocation:
    """Brings every layer down to its budget once all of them are scored.

    Args:
        stores: the layers' buffers, scored.
        config: the policies.
        sequence: the tokens seen, this forward included.
        statistics: what the allocator needs of each layer beyond importance, by name, `[batch]`.

    Returns:
        The allocation, which also rules how far layers may grow while decoding.

    Raises:
        PolicyError: if a policy breaks its contract; the message names policy and layer.
    """
    ranked = [every_head(layer, store, config, sequence) for layer, store in enumerate(stores)]
    importance, context = gather_importance(stores, config, sequence, statistics, ranked)
    allocation = allocate(config, sequence, stores, [store.counts for store in stores], importance, context)
    for layer, store in enumerate(stores):
        shrink(layer, store, config, sequence, allocation, ranked[layer])
    return allocation


def gather_importance(
    stores: List[DenseStore],
    config: CompressionConfig,
    sequence: Sequence,
    statistics: List[dict[str, Tensor]],
    ranked: List[Ranked],
) -> tuple[Tensor, AllocationContext]:
    """Head-mean importance of every layer on one device, padded to the longest layer, with what belongs to it."""
    slots, device = max(store.length for store in stores), stores[-1].device
    rows = []
    for store, (held, score) in zip(stores, ranked, strict=True):
        if score is None:
            score = torch.zeros(store.batch, 1, store.length, dtype=torch.float32, device=store.device)
        elif held.shape[1] > 1:
            score = _rank_by_rank(score, held, sequence.images_at(held))
        rows.append(F.pad(score.mean(1), (0, slots - store.length)).to(device))
    columns = [F.pad(held[:, :1], (0, slots - held.shape[2]), value=-1).to(device) for held, _ in ranked]
    images = [sequence.images_at(column) for column in columns]
    protected = [sequence.protected(column, *protection(config)) for column in columns]
    context = AllocationContext(
        valid=torch.cat(columns, 1).transpose(0, 1) >= 0,
        is_image=None if sequence.is_image is None else torch.cat(images, 1).transpose(0, 1),  # type: ignore[arg-type]
        statistics={
            name: torch.stack([known[name].to(device) for known in statistics]) for name in config.allocator.needs
        },
        protected=torch.cat(protected, 1).transpose(0, 1),
    )
    return torch.stack(rows), context


def _rank_by_rank(score: Tensor, columns: Tensor, images: Tensor | None) -> Tensor:
    """Mean importance over heads that hold different tokens, where the best of each head count as one token, and so on.

    Image tokens are ranked apart from text. The mean of a rank stands where the first head has the token of that rank.
    """
    kind = (columns < 0).long() * 2 - (0 if images is None else images.long())
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))
    ranked = score.gather(-1, order).mean(1, keepdim=True)
    return torch.zeros_like(ranked).scatter_(-1, order[:, :1], ranked)
