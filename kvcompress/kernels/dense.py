"""The hot path: attention with its log-sum-exp, and the attention mass that every key received.

Flash kernels compute the log-sum-exp of every query's logits and throw the probabilities away. With it, the probability
of a key is `exp(q k - lse)`: one more pass over tiles of the logits gives exact attention mass, and no more than a tile
of the `queries x keys` matrix exists at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_TILE_KEYS = 512
_TILE_LOGITS_CPU = 256 * 9 * _TILE_KEYS  # stays in the last-level cache
_TILE_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel


def without_autocast(
    function: Callable[Concatenate[Tensor, _Arguments], _Result],
) -> Callable[Concatenate[Tensor, _Arguments], _Result]:
    """Lets a function of a tensor, and whatever else, compute in the dtypes that it asks for, also under autocast."""

    @wraps(function)
    def exact(tensor: Tensor, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return exact


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
    causal: bool,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Plain attention over one unpadded span, with grouped-query heads.

    Args:
        query: queries, after rotary embedding.
        key: keys, after rotary embedding.
        value: values.
        scaling: factor on the logits, usually `head_dim ** -0.5`.
        causal: whether query i sees only keys up to i (needs as many keys as queries).

    Returns:
        The attention output of every query, in the dtype of `query`.
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=grouped)


@without_autocast
def attention_with_lse(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
    causal: bool,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention as in `attention`, together with the log-sum-exp of every query's scaled logits.

    Uses the flash kernel of the device where there is one that returns it (CPU; CUDA in half precision, the
    memory-efficient kernel in float32) and a blockwise computation elsewhere.

    Returns:
        The output in the dtype of `query`, and the log-sum-exp (natural logarithm, float32 or wider).
    """
    queries, same_dim = query.shape[2], key.shape[3] == value.shape[3]
    if query.device.type == "cpu" and same_dim:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, causal, scale=scaling)  # type: ignore[no-any-return]
    if query.device.type == "cuda" and same_dim:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        if query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] <= 256 and query.shape[3] % 8 == 0:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            output, lse, *_ = flash(query, key, value, 0.0, causal, False, scale=scaling)
        else:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            output, lse, *_ = efficient(query, key, value, None, True, 0.0, causal, scale=scaling)
        return output, lse[:, :, :queries]
    return _blockwise_attention(query, key, value, scaling, causal)


def merge_attention(
    output: Float[Tensor, "batch heads queries value_dim"],
    lse: Float[Tensor, "batch heads queries"],
    other_output: Float[Tensor, "batch heads queries value_dim"],
    other_lse: Float[Tensor, "batch heads queries"],
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Joins the attention of the same queries over two disjoint sets of keys (Online softmax, arXiv 1805.02867).

    Returns:
        Output and log-sum-exp as if one softmax had run over both sets.
    """
    total = torch.logaddexp(lse, other_lse)
    weight, other_weight = (lse - total).exp().unsqueeze(-1), (other_lse - total).exp().unsqueeze(-1)
    return (output * weight + other_output * other_weight).to(output.dtype), total


@without_autocast
def masked_attention_with_lse(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    scaling: float,
    mask: Bool[Tensor, "batch sets tokens"],
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention over the slots that a mask marks, at least one per row, for a few queries; written out in float32.

    Returns:
        The output in the dtype of `query`, and the log-sum-exp, as from `attention_with_lse`.
    """
    logits = (query.float() @ key.float().transpose(2, 3) * scaling).masked_fill_(~mask.unsqueeze(2), -torch.inf)
    lse = logits.logsumexp(-1)
    return (logits.sub_(lse.unsqueeze(-1)).exp_() @ value.float()).to(query.dtype), lse


@without_autocast
def attention_mass(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    start: int = 0,
    step: int = 1,
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Attention probability that each key received, summed over queries and averaged over each group of heads.

    The queries are the last ones of the sequence: query i sees the first `tokens - queries + i + 1` keys. Logits are
    exact to float32 also where queries and keys are in half precision: neither the scaled query nor a logit is rounded
    to it, whose error would grow with the logits. The log-sum-exp is subtracted inside the product, as a further
    dimension of query and key.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits, from `attention_with_lse`.
        scaling: factor on the logits.
        start: first query that counts.
        step: count every `step`-th query from `start` on.

    Returns:
        Mass per key, float32; with every query counted, a head's masses add up to the number of queries.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    past, group, rows = tokens - queries, heads // kv_heads, batch * kv_heads
    query, lse = query[:, :, start::step], lse[:, :, start::step]
    counted, width = query.shape[2], query.shape[3] + 1
    columns = torch.arange(tokens, device=query.device)
    last_key = columns[past + start :: step]  # the query's own token is the last that it sees
    mass = torch.zeros(rows, tokens, dtype=torch.float32, device=query.device)
    tile_queries, tile_keys = _tile(rows * group, query.device)
    tiles = [
        F.pad(key[:, :, left : left + tile_keys].float(), (0, 1), value=1.0).view(rows, -1, width).transpose(1, 2)
        for left in range(0, tokens, tile_keys)
    ]
    ones = torch.ones(rows, 1, group * min(tile_queries, counted), dtype=torch.float32, device=query.device)
    for first in range(0, counted, tile_queries):
        end = min(first + tile_queries, counted)
        block = _with_lse(query[:, :, first:end], lse[:, :, first:end], scaling, kv_heads)
        seen_by_all, seen = past + start + first * step + 1, past + start + (end - 1) * step + 1
        for left, tile in zip(range(0, seen, tile_keys), tiles, strict=False):
            right = min(left + tile_keys, seen)
            logits = torch.bmm(block, tile[:, :, : right - left])
            if right <= seen_by_all:
                probability = logits.exp_()
            else:  # towards the end of the tile some queries see nothing, where their logits mean nothing
                edge = max(left, seen_by_all)
                visible = (columns[edge:right] <= last_key[first:end, None]).float().unsqueeze(1)
                logits[..., edge - left :].clamp_(max=0.0)
                probability = logits.exp_()
                probability.view(rows, end - first, group, -1)[..., edge - left :].mul_(visible)
            mass[:, left:right] += torch.bmm(ones[:, :, : block.shape[1]], probability).squeeze(1)  # a sum, but faster
    return mass.div_(group).view(batch, kv_heads, tokens)


@without_autocast
def attention_probabilities(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    scaling: float,
    last: int,
) -> Float[Tensor, "batch heads last tokens"]:
    """Attention probabilities of the last queries, written out; the arguments are those of `attention_mass`.

    Args:
        query: queries, after rotary embedding.
        key: every key the queries may see; the last `queries` of them belong to the queries' own tokens.
        lse: log-sum-exp of every query's scaled logits.
        scaling: factor on the logits.
        last: number of last queries; all of them where there are fewer.

    Returns:
        Probabilities, float32; zero for keys after the query's own.
    """
    query, lse = query[:, :, -last:].float() * scaling, lse[:, :, -last:].float()
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    logits = torch.matmul(grouped, key.float().transpose(2, 3)).view(batch, heads, queries, tokens)
    visible = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
    return (logits - lse.unsqueeze(-1)).clamp_(max=0.0).exp_().mul_(visible)


@without_autocast
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
    grouped = (query.float() * scaling).view(batch, kv_heads, heads // kv_heads, queries, head_dim)
    transposed = key.float().unsqueeze(2).transpose(3, 4)
    found = query.new_zeros(batch, queries, dtype=torch.float32)
    along, across = (queries, tokens) if over == "keys" else (tokens, queries)
    step = max(16, _TILE_LOGITS_CPU // (batch * heads * across))
    for first in range(0, along, step):
        block = slice(first, first + step)
        if over == "keys":
            share = (grouped[:, :, :, block] @ transposed).softmax(-1).sum(2)
            found[:, block] = share.masked_fill_(~counted.unsqueeze(2), 0.0).sum((1, 3))
        else:
            share = (grouped @ transposed[..., block]).softmax(-2).sum(2)
            found += share.masked_fill_(~counted[:, :, None, block], 0.0).sum((1, 3))
    return found


def _with_lse(query: Tensor, lse: Tensor, scaling: float, kv_heads: int) -> Tensor:
    """Scaled queries with minus their log-sum-exp as one more dimension.

    Returns:
        `[batch * kv_heads, queries * group, head_dim + 1]`, float32.
    """
    batch, heads, queries, head_dim = query.shape
    query = query.view(batch, kv_heads, heads // kv_heads, queries, head_dim).transpose(2, 3).float()
    negative = lse.view(batch, kv_heads, heads // kv_heads, queries, 1).transpose(2, 3).float().neg()
    return torch.cat([query * scaling, negative], dim=-1).flatten(2, 3).flatten(0, 1)


def _tile(head_rows: int, device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile, so that the logits of all heads together suit the device."""
    keys, logits = (_TILE_KEYS, _TILE_LOGITS_CPU) if device.type == "cpu" else (4 * _TILE_KEYS, _TILE_LOGITS_GPU)
    queries = max(16, logits // (head_rows * keys))
    return min(1 << (queries.bit_length() - 1), 1024), keys


def _blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in blocks of query rows, for devices and shapes without a kernel that returns both."""
    group, queries = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1).float(), value.repeat_interleave(group, 1).float()
    columns = torch.arange(key.shape[2], device=query.device)
    outputs, sums = [], []
    for first in range(0, queries, 128):
        block = query[:, :, first : first + 128].float()
        logits = block @ key.transpose(2, 3) * scaling
        if causal:
            logits.masked_fill_(columns > columns[first : first + block.shape[2], None], -torch.inf)
        lse = logits.logsumexp(-1)
        outputs.append(logits.sub_(lse.unsqueeze(-1)).exp_() @ value)
        sums.append(lse)
    return torch.cat(outputs, 2).to(query.dtype), torch.cat(sums, 2)
