"""Attention with its logits written out, for devices, shapes and masks without a fused kernel."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.kernels.softmax import capped, softmax

_BLOCK_QUERIES = 128  # queries whose logits are written out at a time


def written_out_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
    visible: Bool[Tensor, "rows sets some_queries tokens"] | None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention of a few queries over the tokens that they see, in float32 or wider.

    Args:
        query: queries, after rotary embedding.
        keys: keys, after rotary embedding.
        values: values.
        scaling: factor on the logits.
        visible: which tokens count, for all rows, heads and queries or for each; None if all do.
        softcap: what logits stay below; None for logits as they are.

    Returns:
        The output in the dtype of `query`, and the log-sum-exp, as from `attention_with_mask`.
    """
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, keys.shape[1:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.reshape(batch, kv_heads, -1, head_dim).to(wide)
    logits = capped(grouped @ keys.to(wide).transpose(2, 3) * scaling, softcap).view(batch, heads, queries, tokens)
    if visible is not None:
        logits.masked_fill_(~visible, -torch.inf)
    probabilities, lse = softmax(logits)
    output = probabilities.view(batch, kv_heads, -1, tokens) @ values.to(wide)
    return output.view(batch, heads, queries, -1).to(query.dtype), lse


def attention_in_blocks(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
    valid: Bool[Tensor, "batch tokens"] | None,
    causal: bool,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention as in `attention_with_mask`, in blocks of queries."""
    queries, tokens = query.shape[2], keys.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = keys.to(wide), values.to(wide)
    places, shown = torch.arange(tokens, device=query.device), None if valid is None else valid[:, None, None]
    parts = []
    for first in range(0, queries, _BLOCK_QUERIES):
        block, visible = query[:, :, first : first + _BLOCK_QUERIES], shown
        if causal:
            own = places[tokens - queries + first :][: block.shape[2], None]
            visible = (places <= own)[None, None] if shown is None else shown & (places <= own)
        parts.append(written_out_attention(block, keys, values, scaling, visible, softcap))
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(sums, 2)
