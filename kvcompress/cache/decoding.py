"""A decode step of one layer: attention over every slot, and what it frees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.allocation import protection
from kvcompress.cache.importance import every_column, scored_importance
from kvcompress.cache.scoring import attend_in_blocks
from kvcompress.cache.selection import Dropped, merge
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.policies.context import DecodeContext
from kvcompress.policies.faults import policy_errors


def attend_one(
    store: DenseStore, query: Tensor, key: Tensor, value: Tensor, scale: float, column: int, room: int | None
) -> Tensor:
    """Writes one token and attends over all slots.

    Args:
        store: the buffers of the layer.
        query: `[batch, heads, 1, head_dim]`.
        key: `[batch, kv_heads, 1, head_dim]`.
        value: like `key`.
        scale: factor on the logits.
        column: column of the token.
        room: most slots that the layer will ever need; None if it may grow for ever.

    Returns:
        The attention output, `[batch, heads, 1, head_dim]`.
    """
    store.write(key, value, column, room)
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, head_dim)
    if store.packed:
        output = attend_in_blocks(store, grouped, scale)
    else:
        keys, values = store.slots()
        mask = (store.columns() >= 0).unsqueeze(2).expand(-1, kv_heads, -1, -1) if store.has_holes else None
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return output.view(batch, heads, 1, value.shape[3])


def evict(layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence, limits: list[int]) -> None:
    """Frees slots in rows that are over their limit, by the evictor's decode rule.

    Args:
        layer: index of the decoder layer.
        store: its buffers.
        config: the policies; an evictor is among them.
        sequence: the tokens seen.
        limits: slots that each row may hold; one number if it is the same for all.
    """
    evictor = config.evictor
    assert evictor is not None
    merges = config.merger is not None and config.merger.merges_decoding
    if evictor.frees == "oldest" and not merges:
        store.evict_oldest(limits)
        return
    per_row = limits * store.batch if len(limits) == 1 else limits
    if evictor.frees == "oldest":
        before = store.counts
        if all(count <= limit for count, limit in zip(before, per_row, strict=True)):
            store.evict_oldest(limits)
            return
        columns, scores = store.columns().clone(), store.used_scores()
        scores = None if scores is None else scores.clone()  # a freed slot loses its column and score
        store.evict_oldest(limits)
        most = max(count - left for count, left in zip(before, store.counts, strict=True))
        if most:
            _merge(layer, store, config, sequence, columns, scores, store.columns() != columns, most)
        return
    while over := [row for row, count in enumerate(store.counts) if count > per_row[row]]:
        columns, scores, of_all = store.columns(), store.used_scores(), every_column(store)
        protected = sequence.protected(of_all, *protection(config))
        every_score = None if scores is None else store.heads.gather(scores)
        with policy_errors(evictor, layer):
            victims = evictor.victim(DecodeContext(of_all, protected, every_score))
            store.heads_part = store.heads_part or victims.shape[1] > 1
            victims = store.heads.own(victims)
        if merges:
            rows = torch.zeros(store.batch, 1, 1, dtype=torch.bool, device=columns.device)
            rows[over] = True
            freed = torch.zeros(*victims.shape, store.length, dtype=torch.bool, device=columns.device)
            freed = freed.scatter_(-1, victims.unsqueeze(-1), True) & rows
            _merge(layer, store, config, sequence, columns, scores, freed, 1)
        store.evict_at(victims, over)


def _merge(
    layer: int,
    store: DenseStore,
    config: CompressionConfig,
    sequence: Sequence,
    columns: Tensor,
    scores: Tensor | None,
    freed: Tensor,
    most: int,
) -> None:
    """Merges what a decode step frees, at most so many slots a row, given columns and scores from before it."""
    importance = scores
    if config.scorer is not None and scores is not None:
        importance = scored_importance(layer, scores, columns, config.scorer, sequence)
    dropped = Dropped(columns, (columns >= 0) & ~freed, freed, importance, max(store.counts), most)
    merge(layer, store, config, sequence, dropped, decoding=True)
