"""The highest attention probability that any query gives to a key."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.precision import without_autocast
from kvcompress.kernels.softmax import capped

_TILE = 64  # queries at once


@without_autocast
def highest_probability(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    valid: Bool[Tensor, "batch sets tokens"] | None = None,
    softcap: float | None = None,
    last_seen: Int[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch kv_heads tokens"]:
    """The highest probability that a query of a group's heads gives to each key.

    What is highest is so before the exponential, which is taken of the highest alone; a tile of queries at a time.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits.
        scaling: factor on the logits.
        valid: which tokens are no padding, in every head or in each; None if none is. Those of padding say nothing as
            queries, and what they get as keys means nothing.
        softcap: what logits stay below; None for logits as they are.
        last_seen: number of the last of the queries' own tokens that each query sees; None if it is its own.
    """
    (batch, _, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = query.float().reshape(batch, kv_heads, -1, queries, head_dim) * scaling
    lse = lse.float().reshape(batch, kv_heads, -1, queries)
    if valid is not None:
        lse = lse.masked_fill(~valid[..., -queries:].unsqueeze(2), torch.inf)
    keys = key.float().transpose(2, 3)
    highest = torch.full((batch, kv_heads, tokens), -torch.inf, dtype=torch.float32, device=key.device)
    for first in range(0, queries, _TILE):
        end = min(first + _TILE, queries)
        tile = end - first
        seen = tokens - queries + end if last_seen is None else tokens
        logits = capped(torch.matmul(grouped[:, :, :, first:end].flatten(2, 3), keys[..., :seen]), softcap)
        logits = logits.view(batch, kv_heads, -1, tile, seen).sub_(lse[..., first:end, None])
        if last_seen is None:
            later = torch.ones(tile, tile, dtype=torch.bool, device=key.device).triu(1)
            logits[..., seen - tile :].masked_fill_(later, -torch.inf)
        else:
            later = torch.arange(tokens, device=key.device) > last_seen[:, first:end, None] + tokens - queries
            logits.masked_fill_(later[:, None, None], -torch.inf)
        highest[..., :seen] = torch.maximum(highest[..., :seen], logits.amax((2, 3)))
    return highest.clamp_(max=0.0).exp_()
