"""Attention probabilities written out, for a few queries, and the share of them that some keys get."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.dense import rows_of_heads
from kvcompress.kernels.precision import without_autocast
from kvcompress.kernels.softmax import capped

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
    last_seen: Int[Tensor, "batch queries"] | None = None,
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
        last_seen: number of the last of the queries' own tokens that each query sees; None if it is its own.

    Returns:
        Probabilities, float32; zero for keys after the query's own, and for the keys and the queries of padding.
    """
    if valid is not None and valid.ndim == 3:
        sets, heads = valid.shape[1], query.shape[1]
        query, key, lse = (rows_of_heads(tensor, sets) for tensor in (query, key, lse))
        last_seen = None if last_seen is None else last_seen.repeat_interleave(valid.shape[1], 0)
        of_rows = attention_probabilities(query, key, lse, scaling, last, valid.flatten(0, 1), softcap, last_seen)
        return of_rows.reshape(len(valid), heads, *of_rows.shape[2:])
    query, lse = query[:, :, -last:].float() * scaling, lse[:, :, -last:].float()
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    logits = capped(torch.matmul(grouped, key.float().transpose(2, 3)), softcap).view(batch, heads, queries, tokens)
    visible = visible_keys(queries, tokens, last_seen, query.device)
    if valid is not None:
        visible = visible & valid.unsqueeze(1) & valid[:, -queries:].unsqueeze(2)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return (logits - lse.unsqueeze(-1)).clamp_(max=0.0).exp_().mul_(visible.unsqueeze(1))


def visible_keys(
    queries: int, tokens: int, last_seen: Int[Tensor, "batch all_queries"] | None, device: torch.device
) -> Bool[Tensor, "rows queries tokens"]:
    """Which keys the last queries see, padding aside: those up to their own, or up to what `last_seen` says."""
    if last_seen is None:
        return torch.ones(1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    past = tokens - last_seen.shape[1]
    return torch.arange(tokens, device=device) <= last_seen[:, -queries:, None] + past
