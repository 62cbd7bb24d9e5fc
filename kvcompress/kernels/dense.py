"""Attention that tells the log-sum-exp of every query's logits, over padded and unpadded rows.

Flash kernels compute the log-sum-exp and throw the probabilities away. With it, the probability of a key is
`exp(q k - lse)`, and attention over two sets of keys can be joined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvcompress.kernels.precision import in_one_dtype
from kvcompress.kernels.softmax import merge_attention
from kvcompress.kernels.written_out import attention_in_blocks, written_out_attention

_BIAS_ALIGNMENT = 16  # elements; what the memory-efficient kernel wants of a bias, and more


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


def attention_with_mask(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
    valid: Bool[Tensor, "batch tokens"] | None,
    *,
    causal: bool = True,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention over rows that may hold padding, with the log-sum-exp of every query's scaled logits.

    Uses the fused kernel of the device where one returns both (on a CPU; on CUDA, in half precision without padding,
    cuDNN's where sdpa would run it and else flash attention; else the memory-efficient one), and blocks of written-out
    logits elsewhere. Keys are not repeated over the heads of a group, and padding costs a bias of one number per token.

    Args:
        query: queries, after rotary embedding.
        keys: keys, after rotary embedding; with `causal`, at least as many as queries.
        values: values.
        scaling: factor on the logits, usually `head_dim ** -0.5`.
        valid: which tokens are no padding; None if none is. Padding gets no attention.
        causal: whether the last `queries` tokens are the queries' own, of which each sees itself and those before; if
            not, every query sees every token.
        softcap: what logits stay below; logits are written out then. None for logits as they are.

    Returns:
        The output in the dtype of `query` (under autocast, in autocast's), and the log-sum-exp (natural logarithm,
        float32 or wider). A query that sees nothing has the output 0 and the log-sum-exp minus infinity.
    """
    query, keys, values = in_one_dtype(query, keys, values)
    causal = causal and query.shape[2] > 1  # one query sees every token in either case
    if softcap is not None:
        return attention_in_blocks(query, keys, values, scaling, valid, causal, softcap)
    device, same_dim = query.device.type, keys.shape[3] == values.shape[3]
    if device == "cpu" and same_dim:
        past = keys.shape[2] - query.shape[2] if causal else 0
        if past:  # the kernel's own causal mask begins with the first key
            split = (keys[:, :, :past], values[:, :, :past], scaling, None if valid is None else valid[:, :past])
            older = _on_cpu(query, *split, causal=False)
            keys, values, valid = keys[:, :, past:], values[:, :, past:], None if valid is None else valid[:, past:]
            return merge_attention(*_on_cpu(query, keys, values, scaling, valid, causal=True), *older)
        return _on_cpu(query, keys, values, scaling, valid, causal=causal)
    if device == "cuda" and query.shape[3] % 8 == values.shape[3] % 8 == 0:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if valid is None and half and same_dim and query.shape[3] <= 256:
            if (not causal or keys.shape[2] == query.shape[2]) and _sdpa_takes_cudnn(query, keys, values, causal):
                cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
                output, lse, *_ = cudnn(query, keys, values, None, True, 0.0, causal, scale=scaling)
                return output, lse.squeeze(-1)
            flash = torch.ops.aten._scaled_dot_product_flash_attention  # aligns its causal mask with the last key
            output, lse, *_ = flash(query, keys, values, 0.0, causal, False, scale=scaling)
            return output, lse[:, :, : query.shape[2]]
        if half or query.dtype == torch.float32:
            return _memory_efficient(query, keys, values, scaling, valid, causal)
    return attention_in_blocks(query, keys, values, scaling, valid, causal)


def attention_with_slots(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch heads slots head_dim"],
    values: Float[Tensor, "batch heads slots value_dim"],
    scaling: float,
    used: Bool[Tensor, "batch sets slots"] | None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention of a few queries over the slots in use, those of each row or of each head; all if `used` is None.

    Returns:
        The output in the dtype of `query`, and the log-sum-exp, as from `attention_with_mask`.
    """
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if used is None:
        return attention_with_mask(query, keys, values, scaling, None, causal=False, softcap=softcap)
    if query.device.type != "cpu" or keys.shape[3] != values.shape[3] or softcap is not None:
        return written_out_attention(query, keys, values, scaling, used.unsqueeze(2), softcap)
    bias = torch.zeros(used.shape, dtype=query.dtype, device=query.device).masked_fill_(~used, -torch.inf).unsqueeze(2)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = kernel(query, keys, values, 0.0, False, attn_mask=bias, scale=scaling)
    return output, lse.masked_fill(~used.any(-1, keepdim=True), -torch.inf)


def rows_of_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """Heads of which each sees other slots as rows of their own: `[batch, heads, ...]` to `[batch * kv_heads, ...]`."""
    return tensor.reshape(len(tensor) * kv_heads, -1, *tensor.shape[2:])


def _on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, valid: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Flash attention of the CPU; `causal` needs as many keys as queries."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if valid is None:
        return kernel(query, keys, values, 0.0, causal, scale=scaling)  # type: ignore[no-any-return]
    bias = torch.zeros(valid.shape, dtype=query.dtype, device=query.device).masked_fill_(~valid, -torch.inf)
    output, lse = kernel(query, keys, values, 0.0, causal, attn_mask=bias[:, None, None], scale=scaling)
    return output, lse.masked_fill(_blind(valid, query.shape[2], causal), -torch.inf)  # its output is 0 there


def _sdpa_takes_cudnn(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> bool:
    """Whether plain attention would run cuDNN's kernel, the fastest where there is one."""
    grouped = query.shape[1] != keys.shape[1]
    chosen = torch._fused_sdp_choice(query, keys, values, is_causal=causal, enable_gqa=grouped)
    return bool(chosen == SDPBackend.CUDNN_ATTENTION.value)


def _memory_efficient(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, valid: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel of CUDA, which wants as many key heads as query heads.

    A group is its heads and a key/value head a row of the batch, so that keys are expanded instead of repeated.
    """
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, keys.shape[1:3]
    group, rows, bias = heads // kv_heads, batch * kv_heads, None
    if valid is not None:
        width = -(-tokens // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
        bias = torch.zeros(batch, kv_heads, width, dtype=query.dtype, device=query.device)
        bias[:, :, :tokens].masked_fill_(~valid.unsqueeze(1), -torch.inf)
        bias = bias.view(rows, 1, 1, width).expand(rows, group, queries, width)[..., :tokens]
    output, lse, *_ = torch.ops.aten._efficient_attention_forward(
        query.reshape(rows, group, queries, head_dim).transpose(1, 2),
        keys.reshape(rows, tokens, 1, -1).expand(-1, -1, group, -1),
        values.reshape(rows, tokens, 1, -1).expand(-1, -1, group, -1),
        bias,
        None,
        None,
        None,
        None,
        0.0,
        2 if causal else 0,  # the causal mask aligned with the last key
        True,
        scale=scaling,
    )
    lse = lse[..., :queries].reshape(batch, heads, queries)
    output = output.view(batch, kv_heads, queries, group, -1).transpose(1, 2).reshape(batch, queries, heads, -1)
    output = output.transpose(1, 2)
    if valid is None:
        return output, lse
    blind = _blind(valid, queries, causal)
    return output.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)


def _blind(valid: Tensor, queries: int, causal: bool) -> Tensor:
    """Queries that see no token, `[batch, 1, queries or 1]`."""
    seen = valid.cumsum(-1)[:, -queries:] > 0 if causal else valid.any(-1, keepdim=True)
    return ~seen.unsqueeze(1)
