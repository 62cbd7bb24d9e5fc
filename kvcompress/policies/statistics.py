"""Figures of a layer's attention that allocators read beyond importance, by name.

A statistic looks at one layer right after its attention and gives one number per row; `Allocator.needs` names those
that an allocator reads, and only these are computed. Each is a mean over heads, so that processes which share the heads
of a layer can average theirs. All of them look at a small window of the last queries of a
forward, so that no more than `window x tokens` probabilities exist per head. A package of one's own adds to
`STATISTICS` before it makes a configuration that needs its entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.policies.context import LayerContext

Statistic = Callable[[LayerContext], Float[Tensor, " batch"]]

_AFTER_IMAGE = 64  # most queries whose sparsity is counted
_WINDOW = 32  # last queries of entropy and variance
_NEGLIGIBLE = 0.01  # of the largest entry of a query's attention


def attention_sparsity(layer: LayerContext) -> Float[Tensor, " batch"]:
    """Share of a layer's attention entries that are below 1 % of the largest of the same query, 0 to 1, float32.

    Counted over all heads and the queries of this forward after the row's last image token, at most the last 64; over
    the last 64 in rows of text alone, or where the image comes last. A query's entries are the tokens that it sees.

    Source: VL-Cache (arXiv 2410.23317, section 4.1).
    """
    probability = layer.attention_probabilities(_AFTER_IMAGE)
    queries, device = probability.shape[2], probability.device
    visible = layer.visible(_AFTER_IMAGE).unsqueeze(1)
    counted = torch.arange(queries, 0, -1, device=device) <= _queries_after_image(layer)[:, None]  # [batch, queries]
    if layer.valid is not None:
        visible, counted = visible & _of_heads(layer, layer.valid).unsqueeze(2), counted & layer.valid[:, 0, -queries:]
    negligible = visible & (probability < _NEGLIGIBLE * probability.amax(-1, keepdim=True))
    entries = (visible.sum(-1).expand(-1, probability.shape[1], -1).sum(1) * counted).sum(-1)
    return (negligible.sum((1, 3)) * counted).sum(-1).float() / entries.clamp(min=1)


def attention_entropy(layer: LayerContext) -> Float[Tensor, " batch"]:
    """Entropy of a query's attention in nats, mean over the last 32 queries and all heads, at least 0, float32.

    Over the tokens before these queries, or all where there are none, as CAKE's released code does; what a query gives
    to its window is left out, not spread over the rest.

    Source: CAKE (arXiv 2503.12491, its spatial attention dispersion).
    """
    probability, counted = _window(layer)
    entropy: Tensor = torch.special.entr(probability).sum((1, 2, 3))
    return entropy / (probability.shape[1] * counted.sum(-1).clamp(min=1))


def attention_variance(layer: LayerContext) -> Float[Tensor, " batch"]:
    """Variance over the last 32 queries of the attention that a token receives, summed over tokens, mean over heads.

    Over the same tokens as the entropy; float32, at least 0. The variance is that of the queries themselves (divided
    by their number), so that a single query has none.

    Source: CAKE (arXiv 2503.12491, its temporal attention shift).
    """
    probability, counted = _window(layer)
    count, is_counted = counted.sum(-1).clamp(min=1)[:, None, None], counted[:, None, :, None]
    mean = probability.sum(2) / count
    shift = torch.where(is_counted, probability - mean.unsqueeze(2), 0.0).square().sum(2) / count
    return shift.sum(-1).mean(1)


STATISTICS: dict[str, Statistic] = {
    "attention_sparsity": attention_sparsity,
    "attention_entropy": attention_entropy,
    "attention_variance": attention_variance,
}


def _window(
    layer: LayerContext,
) -> tuple[Float[Tensor, "batch heads queries tokens"], Bool[Tensor, "batch queries"]]:
    """Attention of a row's last queries to the tokens before them, or to all where there are none before.

    Returns:
        Probabilities, zero for all else; and which queries are no padding.
    """
    probability = layer.attention_probabilities(_WINDOW)
    (batch, _, queries, tokens), device = probability.shape, probability.device
    if layer.valid is None:
        counted = torch.ones(batch, queries, dtype=torch.bool, device=device)
        return (probability[..., : tokens - queries] if tokens > queries else probability), counted
    counted = layer.valid[:, 0, -queries:]
    alone = _of_heads(layer, layer.held == counted.sum(-1)[:, None, None])  # a row that has its window only
    before = (torch.arange(tokens, device=device) < tokens - queries) | alone
    return torch.where(before.unsqueeze(2), probability, 0.0), counted


def _of_heads(layer: LayerContext, sets: Tensor) -> Tensor:
    """What is known of all heads, or of each key/value head, for query heads: `[batch, 1 or heads, ...]`."""
    return sets if sets.shape[1] == 1 else sets.repeat_interleave(layer.query.shape[1] // sets.shape[1], 1)


def _queries_after_image(layer: LayerContext) -> Int[Tensor, " batch"]:
    """Number of tokens of each row after its last image token; all of them where there is none after, or no image."""
    if layer.is_image is None:
        return layer.seen
    last = layer.index.masked_fill(~layer.is_image, -1).flatten(1).amax(1)
    after = layer.seen - 1 - last
    return torch.where(after > 0, after, layer.seen)
