"""Attention probabilities written out, for a few queries, and the share of them that some keys get."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.kernels.dense import capped, rows_of_heads, without_autocast

_BLOCK_LOGITS = 256 * 9 * 512  # stays in the last-level cache


@without_autocast
def attention_probabilities(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    last: int,
    valid: Bool[Tensor, "batch *sets tokens"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads last tokens"]:
    """Attention probabilities of the last queries, written out; the arguments are those of `attention_mass`.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits.
        scaling: factor on the logits.
        last: number of last queries; all of them where there are fewer.
        valid: which tokens are no padding, in every head or, `[batch, kv_heads, tokens]`, in each; None if none is.
        softcap: what logits stay below; None for logits as they are.

    Returns:
        Probabilities, float32; zero for keys after the query's own, and for the keys and the queries of padding.
    """
    if valid is not None and valid.ndim == 3:
        sets, heads = valid.shape[1], query.shape[1]
        query, key, lse = (rows_of_heads(tensor, sets) for tensor in (query, key, lse))
        of_rows = attention_probabilities(query, key, lse, scaling, last, valid.flatten(0, 1), softcap)
        return of_rows.reshape(len(valid), heads, *of_rows.shape[2:])
    query, lse = query[:, :, -last:].float() * scaling, lse[:, :, -last:].float()
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    logits = capped(torch.matmul(grouped, key.float().transpose(2, 3)), softcap).view(batch, heads, queries, tokens)
    visible = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
    if valid is not None:
        visible = (visible & valid.unsqueeze(1) & valid[:, -queries:].unsqueeze(2)).unsqueeze(1)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return (logits - lse.unsqueeze(-1)).clamp_(max=0.0).exp_().mul_(visible)
