"""Attention of several queries over keys and values that come in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.kernels.dense import attention, attention_with_mask, merge_attention, rows_of_heads


def attend_blocks(
    query: Float[Tensor, "batch heads queries head_dim"],
    blocks: Iterable[tuple[Tensor, Tensor]],
    past: int,
    scaling: float,
    valid: Bool[Tensor, "batch sets tokens"] | None,
    wants_lse: bool,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"] | None]:
    """Attention over older tokens, which every query sees, and causal attention over the queries' own.

    Args:
        query: queries, after rotary embedding.
        blocks: keys and values, `[batch, kv_heads, tokens, dim]` each, the queries' own tokens last.
        past: tokens before those of the queries.
        scaling: factor on the logits.
        valid: which tokens count, for all heads or for each key/value head; None if all do. A row's padding comes first
            among the queries' own tokens.
        wants_lse: whether the log-sum-exp is wanted at all.
        softcap: what logits stay below; None for logits as they are.

    Returns:
        The output, zero for queries that see nothing, and the log-sum-exp of each query's logits.
    """
    if valid is not None and valid.shape[1] > 1:
        kv_heads, shape = valid.shape[1], query.shape[:3]
        rows = ((rows_of_heads(keys, kv_heads), rows_of_heads(values, kv_heads)) for keys, values in blocks)
        of_rows = rows_of_heads(query, kv_heads), rows, past, scaling, valid.flatten(0, 1).unsqueeze(1), wants_lse
        output, lse = attend_blocks(*of_rows, softcap)
        return output.reshape(*shape, -1), None if lse is None else lse.reshape(shape)
    first, parts = 0, None
    for keys, values in blocks:
        end = first + keys.shape[2]
        if valid is None and not wants_lse and softcap is None and past == 0 and keys.shape[2] == query.shape[2]:
            return attention(query, keys, values, scaling, causal=True), None
        for left, right, causal in ((first, min(end, past), False), (max(first, past), end, True)):
            if left < right:
                piece = slice(left - first, right - first)
                own = None if valid is None else valid[:, 0, left:right]
                own_keys, own_values = keys[:, :, piece], values[:, :, piece]
                part = attention_with_mask(query, own_keys, own_values, scaling, own, causal=causal, softcap=softcap)
                parts = part if parts is None else merge_attention(*parts, *part)
        first = end
    assert parts is not None
    return parts


def decode_bias(length: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of a decode step: 0 for the slots in use, minus infinity for the others.

    Args:
        length: slots in use, of any shape.
        slots: slots that there are.
        dtype: dtype of the queries.

    Returns:
        `[..., 1, slots]`.
    """
    used = torch.arange(slots, device=length.device) < length[..., None, None]
    bias = torch.zeros((), dtype=dtype, device=length.device)
    return torch.where(used, bias, torch.full_like(bias, -torch.inf))
