"""Importance of stored tokens, from the scores that their forwards gave them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Scorer
from kvcompress.policies.faults import policy_errors

Ranked: TypeAlias = tuple[Tensor, Tensor | None]  # columns and importance of a layer's slots, over all heads


def every_head(layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence) -> Ranked:
    """Columns and importance of a layer's slots over all of its heads, those that other processes hold included."""
    importance = importance_of(layer, store, config, sequence)
    return every_column(store), None if importance is None else store.heads.gather(importance)


def every_column(store: DenseStore) -> Tensor:
    """Columns of a layer's slots over all of its heads; one set where they hold the same tokens."""
    return store.heads.gather(store.columns()) if store.heads_part else store.columns()


def importance_of(layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence) -> Tensor | None:
    """Importance of every slot of a layer; slots without a score rank with the highest, empty ones are zero."""
    columns, scores = store.columns(), store.used_scores()
    if config.scorer is None or scores is None or not store.length:
        return None
    importance = scored_importance(layer, scores, columns, config.scorer, sequence)
    if importance.isinf().any():
        raise PolicyError(f"scorer {config.scorer.name}: layer {layer}: importance must be finite, got an infinity")
    highest = importance.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return torch.where(importance.isnan(), highest, importance).masked_fill(columns < 0, 0.0)


def scored_importance(layer: int, scores: Tensor, columns: Tensor, scorer: Scorer, sequence: Sequence) -> Tensor:
    """Importance of every slot of a layer, NaN where it has no score."""
    with policy_errors(scorer, layer):
        return scorer.importance(scores, sequence.queries_on(columns, last=not scorer.accumulates, layer=layer))
