"""The highest attention probability that any query gives to a key."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.precision import without_autocast
from kvcompress.kernels.softmax import capped

_TILE_LOGITS_CPU = 256 * 1024  # stays in the caches of a core
_TILE_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel
_LEAST_ROWS = 64  # queries of all heads of a group at once, at least


@without_autocast
def highest_probability(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    valid: Bool[Tensor, "batch sets tokens"] | None = None,
    softcap: float | None = None,
    last_seen: Int[Tensor, "batch queries"] | None = None,
    part: slice | None = None,
) -> Float[Tensor, "batch kv_heads asked"]:
    """The highest probability that a query of a group's heads gives to each key.

    What is highest is so before the exponential, which is taken of the highest alone; a tile of queries at a time.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits; a query with minus infinity, which sees nothing, says nothing.
        scaling: factor on the logits.
        valid: which tokens are no padding, in every head or in each; None if none is. Those of padding say nothing as
            queries, and what they get as keys means nothing.
        softcap: what logits stay below; None for logits as they are.
        last_seen: number of the last of the queries' own tokens that each query sees; None if it is its own.
        part: keys that are asked about, of tokens before the queries' own, which every query sees; None for all keys.
    """
    (batch, heads, queries, head_dim), kv_heads = query.shape, key.shape[1]
    rows, group, past = batch * kv_heads, heads // kv_heads, key.shape[2] - queries
    negative = lse.float().neg().reshape(batch, kv_heads, group, queries)
    negative = negative.masked_fill(negative == torch.inf, -torch.inf)
    if valid is not None:
        negative = negative.masked_fill_(~valid[..., -queries:].unsqueeze(2), -torch.inf)
    # The heads of a group beside each other, query by query, as rows of one matrix.
    negative = negative.transpose(2, 3).reshape(rows, -1, 1)
    grouped = query.float().reshape(batch, kv_heads, group, queries, head_dim).transpose(2, 3)
    grouped = grouped.reshape(rows, -1, head_dim)
    keys = (key if part is None else key[:, :, part]).float().flatten(0, 1).transpose(1, 2)
    tokens = keys.shape[2]
    highest = torch.full((rows, tokens), -torch.inf, dtype=torch.float32, device=key.device)
    most = _TILE_LOGITS_CPU if key.device.type == "cpu" else _TILE_LOGITS_GPU
    tile = max(1, max(_LEAST_ROWS, most // max(1, rows * tokens)) // group)
    for first in range(0, queries, tile):
        end = min(first + tile, queries)
        block = slice(first * group, end * group)
        seen = tokens if part is not None or last_seen is not None else past + end
        if softcap is None:
            logits = torch.baddbmm(negative[:, block], grouped[:, block], keys[..., :seen], alpha=scaling)
        else:
            logits = torch.bmm(grouped[:, block], keys[..., :seen]).mul_(scaling)
            logits = capped(logits, softcap).add_(negative[:, block])
        if part is None:
            _hide_later(logits.view(batch, kv_heads, end - first, group, seen), last_seen, first, past)
        highest[:, :seen] = torch.maximum(highest[:, :seen], logits.amax(1))
    return highest.clamp_(max=0.0).exp_().view(batch, kv_heads, tokens)


def _hide_later(logits: Tensor, last_seen: Tensor | None, first: int, past: int) -> None:
    """Gives minus infinity to the keys that a tile's queries, from the `first` on, do not see."""
    queries, seen, device = logits.shape[2], logits.shape[4], logits.device
    if last_seen is None:
        later = torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)
        logits[..., seen - queries :].masked_fill_(later.unsqueeze(1), -torch.inf)
    else:
        last = last_seen[:, first : first + queries, None] + past
        later = torch.arange(seen, device=device) > last
        logits.masked_fill_(later[:, None, :, None], -torch.inf)
