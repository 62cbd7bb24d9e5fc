"""The share of each query's attention that some keys get, without causal mask."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.kernels.precision import without_autocast

_LOGITS_CPU = 256 * 9 * 512  # stays in the last-level cache
_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel


@without_autocast
def attention_share(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    counted: Bool[Tensor, "batch sets tokens"],
    scaling: float,
    over: Literal["keys", "queries"] = "keys",
    asked: Bool[Tensor, "batch queries"] | None = None,
    valid: Bool[Tensor, "batch counts tokens"] | None = None,
) -> Float[Tensor, "batch queries"]:
    """Attention probability that each query gives to some keys, summed over them and over heads, without causal mask.

    Args:
        query: the queries that are asked, after rotary embedding.
        key: every key that there is, before or after the queries.
        counted: keys whose probability is summed; one set for all heads, or one for each key/value head.
        scaling: factor on the logits.
        over: what the softmax runs over: all keys, for each query; or these queries, for each key.
        asked: which of the queries are asked; None if all are.
        valid: which keys there are; None if all are.

    Returns:
        Sums, float32, zero for queries that are not asked; with `over="keys"` at most the number of heads.
    """
    (batch, heads, queries, head_dim), kv_heads = query.shape, key.shape[1]
    if valid is not None:
        counted = counted & valid
    if over == "keys":
        grouped = query.reshape(batch, kv_heads, -1, head_dim)  # every query sees the same keys: one group, one query
        marks = F.pad(counted.to(key.dtype).unsqueeze(-1), (0, head_dim - 1)).expand(-1, kv_heads, -1, -1)
        mask = None if valid is None else valid.unsqueeze(2)
        share = F.scaled_dot_product_attention(grouped, key, marks, attn_mask=mask, scale=scaling)[..., 0]
        share = share.view(batch, heads, queries).sum(1, dtype=torch.float32)
    else:
        share = _over_queries(query, key, counted, scaling, asked)
    return share if asked is None else share.masked_fill(~asked, 0.0)


def _over_queries(query: Tensor, key: Tensor, counted: Tensor, scaling: float, asked: Tensor | None) -> Tensor:
    """Softmax over the queries for each key, a block of keys at a time."""
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = (query.float() * scaling).reshape(batch, kv_heads, -1, head_dim)
    counted, share = counted[:, :, None, None].float(), query.new_zeros(batch, queries, dtype=torch.float32)
    step = max(16, (_LOGITS_CPU if query.device.type == "cpu" else _LOGITS_GPU) // (batch * heads * queries))
    for first in range(0, tokens, step):
        block = slice(first, first + step)
        logits = grouped @ key[:, :, block].float().transpose(2, 3)
        logits = logits.view(batch, kv_heads, heads // kv_heads, queries, -1)
        if asked is not None:
            logits = logits.masked_fill_(~asked[:, None, None, :, None], torch.finfo(torch.float32).min)
        share += (logits.softmax(-2) * counted[..., block]).sum((1, 2, 4))
    return share
