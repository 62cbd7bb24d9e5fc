"""Attention of a scoring forward over rows without padding, and the scores it gives to every slot."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.errors import PolicyError
from kvcompress.kernels import attention, attention_with_lse, masked_attention_with_lse, merge_attention
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.policies.statistics import STATISTICS


@dataclass(frozen=True)
class Queries:
    """Queries of a forward that have attended over rows of equal length, and what scoring needs of them.

    Attributes:
        rows: the rows.
        past: older slots per row; the queries' own tokens lie right after them.
        query: `[rows, heads, queries, head_dim]`.
        lse: log-sum-exp of each query's scaled logits; None if nobody reads attention.
        scale: factor on the logits.
        weights: the layer's own weights, as far as scorers read them.
    """

    rows: slice
    past: int
    query: Tensor
    lse: Tensor | None
    scale: float
    weights: LayerWeights

    def first(self, count: int) -> Queries:
        """The first of them."""
        return replace(self, query=self.query[:, :, :count], lse=None if self.lse is None else self.lse[:, :, :count])


def attend_and_score(
    layer: int,
    store: DenseStore,
    rows: slice,
    past: int,
    query: Tensor,
    scale: float,
    weights: LayerWeights,
    scorer: Scorer | None,
    needs: Collection[str],
    statistics: dict[str, Tensor],
    sequence: Sequence,
) -> tuple[Tensor, Queries]:
    """Attends over older slots and the forward's own tokens, which are in the store already, and sets scores.

    Args:
        layer: index of the decoder layer.
        store: its buffers; the new tokens lie right after `past` older ones.
        rows: rows of equal length without padding.
        past: older slots per row; every query sees them all.
        query: `[rows, heads, queries, head_dim]`.
        scale: factor on the logits.
        weights: the layer's own weights, as far as scorers read them.
        scorer: the scorer, if any.
        needs: names of the statistics that the allocator reads.
        statistics: where they are put, `[batch]` each.
        sequence: the tokens seen, this forward included.

    Returns:
        The attention output, `[rows, heads, queries, head_dim]`, and the queries, for scoring them once more.

    Raises:
        PolicyError: if the scores have the wrong shape or are not finite.
    """
    tokens = past + query.shape[2]
    reads_attention = bool(needs) or (scorer is not None and scorer.reads_attention)
    if past == 0 and not reads_attention:
        ((keys, values),) = store.blocks(rows, tokens)
        output, lse = attention(query, keys, values, scale, causal=True), None
    else:
        output, lse = _attend(store, rows, past, query, scale)
    queries = Queries(rows, past, query, lse if reads_attention else None, scale, weights)
    score(layer, store, queries, scorer, needs, statistics, sequence)
    return output, queries


def score(
    layer: int,
    store: DenseStore,
    queries: Queries,
    scorer: Scorer | None,
    needs: Collection[str],
    statistics: dict[str, Tensor],
    sequence: Sequence,
) -> None:
    """Lets queries that have attended score every slot; the arguments are those of `attend_and_score`."""
    rows, query, tokens = queries.rows, queries.query, queries.past + queries.query.shape[2]
    if scorer is None and not needs:
        return
    keys, values, columns = (tensor[rows, :, :tokens] for tensor in (*store.slots(), store.columns()))
    context = LayerContext(
        layer=layer,
        query=query,
        keys=keys,
        values=values,
        lse=queries.lse,
        scaling=queries.scale,
        index=sequence.index_of(columns, rows),
        seen=sequence.row_seen[rows.start or 0],
        is_image=sequence.images_at(columns, rows),
        weights=queries.weights,
        heads=store.heads,
    )
    for name in needs:
        known = statistics.setdefault(name, torch.zeros(store.batch, dtype=torch.float32, device=query.device))
        known[rows] = store.heads.mean(STATISTICS[name](context))
    if scorer is not None:
        scores = scorer.score(context)
        expected = tuple(keys.shape[:3])
        if tuple(scores.shape) != expected or not bool(scores.isfinite().all()):
            came = f"the shape {tuple(scores.shape)}" if tuple(scores.shape) != expected else "NaN or infinite scores"
            raise PolicyError(
                f"scorer {scorer.name}: layer {layer}: must return finite scores of the shape "
                f"{expected} [batch, kv_heads, tokens]; got {came}"
            )
        store.score(rows, tokens, scores, add=scorer.accumulates)


def attend_in_blocks(store: DenseStore, query: Tensor, scale: float) -> Tensor:
    """Attention of a decode step over a store that gives its slots in blocks, of which only the last has empty ones.

    Args:
        store: the buffers of a layer.
        query: `[batch, kv_heads, group, head_dim]`, the query heads of a group as queries.
        scale: factor on the logits.
    """
    first, parts = 0, None
    for keys, values in store.blocks(slice(None), store.length):
        end = first + keys.shape[2]
        if end == store.length and store.has_holes:
            mask = store.columns()[:, :, first:end] >= 0
            part = masked_attention_with_lse(query, keys, values, scale, mask)
        else:
            part = attention_with_lse(query, keys, values, scale, causal=False)
        parts, first = part if parts is None else merge_attention(*parts, *part), end
    assert parts is not None
    return parts[0]


def _attend(store: DenseStore, rows: slice, past: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over what the store gives block by block: all of it for older slots, causal for the new tokens."""
    first, tokens, parts = 0, past + query.shape[2], None
    for keys, values in store.blocks(rows, tokens):
        end = first + keys.shape[2]
        for left, right, causal in ((first, min(end, past), False), (max(first, past), end, True)):
            if left < right:
                piece = slice(left - first, right - first)
                part = attention_with_lse(query, keys[:, :, piece], values[:, :, piece], scale, causal=causal)
                parts = part if parts is None else merge_attention(*parts, *part)
        first = end
    assert parts is not None
    return parts
