"""The highest attention probability that any query gives to a key: among all keys, or among some."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.dense import capped, without_autocast

_TILE = 64  # queries at once
_TILE_LOGITS_CPU = 256 * 1024  # stays in the caches of a core
_TILE_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel


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


@without_autocast
def highest_among(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    scaling: float,
    valid: Bool[Tensor, "batch sets tokens"] | None = None,
    softcap: float | None = None,
    last_seen: Int[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch kv_heads older"]:
    """The highest probability that a query of a group's heads gives to each older key, if these keys were all.

    Each logit is computed once: no log-sum-exp of theirs is known before.

    Args:
        query: queries, after rotary embedding.
        key: every key that the softmax runs over; the last `queries` of them belong to the queries' own tokens, and are
            not asked about.
        scaling: factor on the logits.
        valid: which tokens are no padding, in every head or in each; None if none is. Those of padding say nothing as
            queries, and what they get as keys means nothing.
        softcap: what logits stay below; None for logits as they are.
        last_seen: number of the last of the queries' own tokens that each query sees; None if it is its own.
    """
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    rows, group, older = batch * kv_heads, heads // kv_heads, tokens - queries
    # The heads of a group beside each other, query by query, as rows of one matrix.
    grouped = query.float().reshape(batch, kv_heads, group, queries, head_dim).transpose(2, 3) * scaling
    grouped, keys = grouped.reshape(rows, -1, head_dim), key.float().flatten(0, 1).transpose(1, 2)
    highest = torch.zeros(batch, kv_heads, older, dtype=torch.float32, device=key.device)
    most = _TILE_LOGITS_CPU if key.device.type == "cpu" else _TILE_LOGITS_GPU
    tile = max(16, most // (rows * group * tokens))
    for first in range(0, queries, tile):
        end = min(first + tile, queries)
        seen = older + end if last_seen is None else tokens
        logits = capped(torch.bmm(grouped[:, first * group : end * group], keys[..., :seen]), softcap)
        logits = logits.view(batch, kv_heads, end - first, group, seen)
        places = torch.arange(older + first, seen, device=key.device) - older
        last = places[: end - first] if last_seen is None else last_seen[:, first:end]
        hidden = (places > last.unsqueeze(-1)).view(-1, 1, end - first, 1, len(places))
        logits[..., older + first :].masked_fill_(hidden, -torch.inf)
        if valid is None:
            highest = torch.maximum(highest, logits.softmax(-1)[..., :older].amax((2, 3)))
        else:
            logits.masked_fill_(~valid[:, :, None, None, :seen], -torch.inf)
            counts = valid[:, :, older + first : older + end, None, None]
            highest = torch.maximum(highest, logits.softmax(-1)[..., :older].masked_fill_(~counts, 0.0).amax((2, 3)))
    return highest
