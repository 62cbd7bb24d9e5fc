"""Attention probabilities written out, for a few queries, and the share of them that some keys get."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_BLOCK_LOGITS = 256 * 9 * 512  # stays in the last-level cache


def attention_probabilities(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    last: int,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads last tokens"]:
    """Attention probabilities of the last queries, written out; the arguments are those of `attention_mass`.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits.
        scaling: factor on the logits.
        last: number of last queries; all of them where there are fewer.
        valid: which tokens are no padding; None if none is.

    Returns:
        Probabilities, float32; zero for keys after the query's own, and for the keys and the queries of padding.
    """
    query, lse = query[:, :, -last:].float() * scaling, lse[:, :, -last:].float()
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    logits = torch.matmul(grouped, key.float().transpose(2, 3)).view(batch, heads, queries, tokens)
    visible = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
    if valid is not None:
        visible = (visible & valid.unsqueeze(1) & valid[:, -queries:].unsqueeze(2)).unsqueeze(1)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return (logits - lse.unsqueeze(-1)).clamp_(max=0.0).exp_().mul_(visible)


def attention_share(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    counted: Bool[Tensor, "batch sets tokens"],
    scaling: float,
    over: Literal["keys", "queries"] = "keys",
) -> Float[Tensor, "batch queries"]:
    """Attention probability that each query gives to some keys, summed over them and over heads, without causal mask.

    Logits exist for a block at a time.

    Args:
        query: the queries that are asked, after rotary embedding.
        key: every key that there is, before or after the queries.
        counted: keys whose probability is summed; one set for all heads, or one for each key/value head.
        scaling: factor on the logits.
        over: what the softmax runs over: all keys, for each query; or these queries, for each key.

    Returns:
        Sums, float32; with `over="keys"` at most the number of heads.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    grouped = (query.float() * scaling).reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    transposed = key.float().unsqueeze(2).transpose(3, 4)
    found = query.new_zeros(batch, queries, dtype=torch.float32)
    along, across = (queries, tokens) if over == "keys" else (tokens, queries)
    step = max(16, _BLOCK_LOGITS // (batch * heads * across))
    for first in range(0, along, step):
        block = slice(first, first + step)
        if over == "keys":
            share = (grouped[:, :, :, block] @ transposed).softmax(-1).sum(2)
            found[:, block] = share.masked_fill_(~counted.unsqueeze(2), 0.0).sum((1, 3))
        else:
            share = (grouped @ transposed[..., block]).softmax(-2).sum(2)
            found += share.masked_fill_(~counted[:, :, None, block], 0.0).sum((1, 3))
    return found
