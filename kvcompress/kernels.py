"""The hot path: attention with its log-sum-exp, and the attention mass that every key received.

Flash kernels compute the log-sum-exp of every query's logits and throw the probabilities away. With it, the probability
of a key is `exp(q k - lse)`: one more pass over tiles of the logits gives exact attention mass, and no more than a tile
of the `queries x keys` matrix exists at any time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TILE_KEYS = 512
_TILE_LOGITS_CPU = 256 * 9 * _TILE_KEYS  # stays in the last-level cache
_TILE_LOGITS_GPU = 64 * 1024 * 1024  # large enough to hide the launch of a kernel


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
        return tuple(kernel(query, key, value, 0.0, causal, scale=scaling))  # type: ignore[return-value]
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
    rounded to the dtype of `query`, as in unfused attention; probabilities and sums are float32.

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
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    past, group, rows = tokens - queries, heads // kv_heads, batch * kv_heads
    mass = torch.zeros(rows, tokens, dtype=torch.float32, device=query.device)
    key_columns = torch.arange(tokens, device=query.device)
    transposed = key.reshape(rows, tokens, head_dim).transpose(1, 2)
    scaled = (query[:, :, start::step] * scaling).reshape(rows, group, -1, head_dim)
    negative_lse = lse[:, :, start::step].float().neg().reshape(rows, group, -1, 1)
    last_key = key_columns[past + start :: step]  # the query's own token, the last key it sees
    counted, tile_keys, tile_queries = scaled.shape[2], *_tile(rows * group, query.device)
    for first in range(0, counted, tile_queries):
        end = min(first + tile_queries, counted)
        block = scaled[:, :, first:end].reshape(rows, -1, head_dim)
        shift = negative_lse[:, :, first:end].reshape(rows, -1, 1)
        whole, limit = past + start + first * step + 1, past + start + (end - 1) * step + 1
        for left in range(0, limit, tile_keys):
            right = min(left + tile_keys, limit)
            probability = torch.bmm(block, transposed[:, :, left:right]).float()
            probability.add_(shift).exp_()
            if right > whole:  # some query of the block does not see the whole tile
                hidden = key_columns[left:right] > last_key[first:end, None]
                probability.view(rows, group, end - first, -1).masked_fill_(hidden, 0.0)
            mass[:, left:right] += probability.sum(1)
    return mass.div_(group).view(batch, kv_heads, tokens)


def _tile(head_rows: int, device: torch.device) -> tuple[int, int]:
    """Keys and queries of a tile, so that the logits of all heads together stay within the device's budget."""
    keys, logits = (_TILE_KEYS, _TILE_LOGITS_CPU) if device.type == "cpu" else (4 * _TILE_KEYS, _TILE_LOGITS_GPU)
    queries = max(16, logits // (head_rows * keys))
    return keys, min(1 << (queries.bit_length() - 1), 1024)


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
