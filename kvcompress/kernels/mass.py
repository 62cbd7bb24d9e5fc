"""The attention mass that every key received: the sum of its probabilities over queries and heads.

With the log-sum-exp of a query, the probability of a key is `exp(q k - lse)`: one more pass over tiles of the logits
gives exact attention mass, and no more than a tile of the `queries x keys` matrix exists at any time.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels.dense import rows_of_heads
from kvcompress.kernels.device import takes_triton
from kvcompress.kernels.precision import without_autocast
from kvcompress.kernels.softmax import capped

_TILE_KEYS = 512
_TILE_LOGITS_CPU = 64 * 9 * _TILE_KEYS  # about what the second-level cache holds
_TILE_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel


@without_autocast
def attention_mass(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    *,
    valid: Bool[Tensor, "batch *sets tokens"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    stride: int = 1,
    start: int = 0,
    softcap: float | None = None,
    last_seen: Int[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Attention probability that each key received, summed over the counted queries and the heads of its group.

    The queries are those of the last `queries` tokens: each sees the tokens up to its own, or up to `last_seen`. In row
    b, the queries `first[b] + start`, `first[b] + start + stride`, ... count, as far as there are any. Logits are
    products of the numbers as they are, summed, scaled and exponentiated in float32, in half precision too.

    Args:
        query: queries, after rotary embedding.
        keys: every key the queries may see, after rotary embedding; the last `queries` are of the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits, from `attention_with_mask`; a query with minus infinity, which
            sees nothing, adds nothing.
        scaling: factor on the logits.
        valid: which tokens are no padding, in every head or, `[batch, kv_heads, tokens]`, in each; None if none is. The
            keys of padding get 0, its queries add nothing.
        first: a row's first query that may count, at least 0; None for 0 in all rows.
        stride: count every `stride`-th query, at least 1.
        start: queries to leave out before the first that counts, at least 0.
        softcap: what logits stay below; None for logits as they are.
        last_seen: number of the last of the queries' own tokens that each query sees, at least its own; None if it is
            its own.

    Returns:
        Mass per key, float32. The masses of a key/value head add up to the number of counted queries that see anything,
        times the heads of a group.
    """
    if valid is not None and valid.ndim == 3:
        sets, shape = valid.shape[1], keys.shape[:3]
        query, keys, lse = (rows_of_heads(tensor, sets) for tensor in (query, keys, lse))
        first, valid = None if first is None else first.repeat_interleave(sets), valid.flatten(0, 1)
        last_seen = None if last_seen is None else last_seen.repeat_interleave(sets, 0)
        of_rows = attention_mass(
            query,
            keys,
            lse,
            scaling,
            valid=valid,
            first=first,
            stride=stride,
            start=start,
            softcap=softcap,
            last_seen=last_seen,
        )
        return of_rows.view(shape)
    if takes_triton(query) and softcap is None and last_seen is None:
        from kvcompress.kernels import triton_mass

        return triton_mass.mass(query, keys, lse, scaling, valid, first, stride, start)
    return _in_tiles(query, keys, lse, scaling, valid, first, stride, start, softcap, last_seen)


def _in_tiles(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    scaling: float,
    valid: Tensor | None,
    first: Tensor | None,
    stride: int,
    start: int,
    softcap: float | None,
    last_seen: Tensor | None,
) -> Tensor:
    """Attention mass by matrix products of tiles, to which minus the log-sum-exp is added."""
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, keys.shape[1:3]
    past, group, rows = tokens - queries, heads // kv_heads, batch * kv_heads
    alike = last_seen is None and (first is None or stride == 1)  # whether all rows count and see the same
    query, lse, last_key = _counted(query, lse, valid, first, stride, start, past, last_seen)
    counted = query.shape[2]
    tile_queries, tile_keys = _tile(rows * group, query.device)
    grouped = (
        query.reshape(batch, kv_heads, group, counted, head_dim).transpose(2, 3).float().reshape(rows, -1, head_dim)
    )
    negative = lse.float().reshape(batch, kv_heads, group, counted).transpose(2, 3).reshape(rows, -1, 1).neg()
    places = torch.arange(tokens, device=query.device)
    ones = torch.ones(rows, 1, group * min(tile_queries, counted), dtype=torch.float32, device=query.device)
    mass = torch.zeros(rows, tokens, dtype=torch.float32, device=query.device)
    for left in range(0, tokens, tile_keys):
        unseeing = max(0, -(-(left - past - start) // stride)) if alike else 0  # queries before the tile's first key
        if unseeing >= counted:
            break
        tile = keys[:, :, left : left + tile_keys].float().reshape(rows, -1, head_dim).transpose(1, 2)
        for begin in range(unseeing // tile_queries * tile_queries, counted, tile_queries):
            end = min(begin + tile_queries, counted)
            seen_by_all = past + start + begin * stride + 1
            seen = past + start + (end - 1) * stride + 1 if alike else tokens
            right = min(left + tile.shape[2], seen)
            block = slice(begin * group, end * group)
            asks, seen_keys = grouped[:, block], tile[:, :, : right - left]
            if softcap is None:
                logits = torch.baddbmm(negative[:, block], asks, seen_keys, alpha=scaling)
            else:
                logits = capped(torch.bmm(asks, seen_keys).mul_(scaling), softcap).add_(negative[:, block])
            if right <= seen_by_all:
                probability = logits.exp_()
            else:  # towards the end of the tile some queries see nothing, where their logits mean nothing
                edge = max(left, seen_by_all)
                visible = (places[edge:right] <= last_key[:, begin:end, None]).float()[:, None, :, None]
                logits[..., edge - left :].clamp_(max=0.0)
                probability = logits.exp_()
                probability.view(batch, kv_heads, end - begin, group, -1)[..., edge - left :].mul_(visible)
            mass[:, left:right] += torch.bmm(ones[:, :, : probability.shape[1]], probability).squeeze(1)
    mass = mass.view(batch, kv_heads, tokens)
    return mass if valid is None else mass.masked_fill_(~valid.unsqueeze(1), 0.0)


def _counted(
    query: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    first: Tensor | None,
    stride: int,
    start: int,
    past: int,
    last_seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that count in some row, and the last key that each sees.

    Returns:
        Queries `[batch, heads, counted, head_dim]`, their log-sum-exp, infinite for those that add nothing, and the
        last keys `[batch or 1, counted]`.
    """
    heads, queries, head_dim = query.shape[1:]
    index = torch.arange(start, queries, stride, device=query.device).unsqueeze(0)
    seen = None if valid is None else valid[:, past:]
    if first is None or stride == 1:
        query, lse = query[:, :, start::stride], lse[:, :, start::stride]
        seen = seen if seen is None else seen[:, start::stride]
        until = index if last_seen is None else last_seen[:, start::stride]
        if first is not None:
            late = index >= (first + start).unsqueeze(1)
            seen = late if seen is None else seen & late
    else:
        index = index + first.unsqueeze(1)
        at, exists = index.clamp(max=queries - 1), index < queries
        until = index if last_seen is None else last_seen.gather(1, at)
        seen = exists if seen is None else seen.gather(1, at) & exists
        lse = lse.gather(2, at.unsqueeze(1).expand(-1, heads, -1))
        query = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, head_dim))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return query, lse if seen is None else lse.masked_fill_(~seen.unsqueeze(1), torch.inf), until + past


def _tile(head_rows: int, device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile, so that the logits of all heads together suit the device."""
    keys, logits = (_TILE_KEYS, _TILE_LOGITS_CPU) if device.type == "cpu" else (4 * _TILE_KEYS, _TILE_LOGITS_GPU)
    queries = max(16, logits // (head_rows * keys))
    return min(1 << (queries.bit_length() - 1), 1024), keys
