"""Attention of several queries over keys and values that come in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.dense import attention, attention_with_mask, rows_of_heads
from kvcompress.kernels.softmax import merge_attention
from kvcompress.kernels.written_out import written_out_attention

_BLOCK_QUERIES = 128  # queries whose logits ahead of themselves are written out at a time


def attend_blocks(
    query: Float[Tensor, "batch heads queries head_dim"],
    blocks: Iterable[tuple[Tensor, Tensor]],
    past: int,
    scaling: float,
    valid: Bool[Tensor, "batch sets tokens"] | None,
    wants_lse: bool,
    softcap: float | None = None,
    last_seen: Int[Tensor, "batch queries"] | None = None,
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
        last_seen: number of the last of the queries' own tokens that each query sees, at least its own; None if it is
            its own.

    Returns:
        The output, zero for queries that see nothing, and the log-sum-exp of each query's logits.
    """
    if valid is not None and valid.shape[1] > 1:
        kv_heads, shape = valid.shape[1], query.shape[:3]
        rows = ((rows_of_heads(keys, kv_heads), rows_of_heads(values, kv_heads)) for keys, values in blocks)
        of_rows = rows_of_heads(query, kv_heads), rows, past, scaling, valid.flatten(0, 1).unsqueeze(1), wants_lse
        last_seen = None if last_seen is None else last_seen.repeat_interleave(kv_heads, 0)
        output, lse = attend_blocks(*of_rows, softcap, last_seen)
        return output.reshape(*shape, -1), None if lse is None else lse.reshape(shape)
    first, parts = 0, None
    for keys, values in blocks:
        end = first + keys.shape[2]
        plain = valid is None and last_seen is None and not wants_lse and softcap is None
        if plain and past == 0 and keys.shape[2] == query.shape[2]:
            return attention(query, keys, values, scaling, causal=True), None
        for left, right, causal in ((first, min(end, past), False), (max(first, past), end, True)):
            if left < right:
                piece = slice(left - first, right - first)
                own = None if valid is None else valid[:, 0, left:right]
                own_keys, own_values = keys[:, :, piece], values[:, :, piece]
                part = attention_with_mask(query, own_keys, own_values, scaling, own, causal=causal, softcap=softcap)
                if causal and last_seen is not None:
                    part = _ahead_too(part, query, own_keys, own_values, scaling, own, softcap, last_seen)
                parts = part if parts is None else merge_attention(*parts, *part)
        first = end
    assert parts is not None
    return parts


def _ahead_too(
    causal: tuple[Tensor, Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    valid: Tensor | None,
    softcap: float | None,
    last_seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the queries' own tokens, and what each sees of those after itself; asks the device once."""
    output, lse = (part.clone() for part in causal)
    queries = last_seen.shape[1]
    own, ends = torch.arange(queries, device=last_seen.device), range(0, queries, _BLOCK_QUERIES)
    furthest = torch.where(last_seen > own, last_seen, -1).amax(0)
    most = torch.stack([block.amax() for block in torch.split(furthest, _BLOCK_QUERIES)]).tolist()
    for first, end in zip(ends, most, strict=True):
        if end < 0:
            continue
        block, seen = slice(first, first + _BLOCK_QUERIES), slice(first, int(end) + 1)
        visible = (own[seen] > own[block, None]) & (own[seen] <= last_seen[:, block, None])
        if valid is not None:
            visible = visible & valid[:, None, seen]
        ahead = written_out_attention(
            query[:, :, block], keys[:, :, seen], values[:, :, seen], scaling, visible.unsqueeze(1), softcap
        )
        output[:, :, block], lse[:, :, block] = merge_attention(output[:, :, block], lse[:, :, block], *ahead)
    return output, lse


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
