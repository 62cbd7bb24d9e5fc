"""Attention mass in one Triton kernel: a program sums a block of keys over all queries of a head, without atomics."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import is_hopper, launching, powers

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _tile_mass(
    k, K, Q, LSE, VALID, scale, k_stride, q_stride, lse_stride, queries, tokens, begin, stride, counted, key,
    D: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from a block of counted queries, of which `counted` is the first.

    `WHOLE` says that all queries of the block exist, `MASKED` that some come before some of the keys. `scale` is for
    powers of two.
    """
    index = (begin + (counted + tl.arange(0, BLOCK_Q)) * stride).to(tl.int32)
    past, dim = tokens - queries, tl.arange(0, CHUNK)
    q_at = Q + index.to(tl.int64)[:, None] * q_stride + dim[None, :]
    lse_at, valid_at = LSE + index.to(tl.int64) * lse_stride, VALID + past + index
    if WHOLE:
        lse, q_mask = tl.load(lse_at), (dim < D)[None, :]
    else:
        exists = index < queries
        lse, q_mask = tl.load(lse_at, mask=exists, other=float("inf")), exists[:, None] & (dim < D)[None, :]
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * _LOG2_E
    if HAS_VALID:
        valid = tl.load(valid_at) if WHOLE else tl.load(valid_at, mask=exists, other=0)
        lse = tl.where(valid != 0, lse, float("inf"))
    q = tl.load(q_at) if WHOLE and CHUNK == D else tl.load(q_at, mask=q_mask, other=0.0)
    if CHUNK == DIMS:
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        k_at = K + key.to(tl.int64)[:, None] * k_stride + dim[None, :]
        seen = (key < tokens)[:, None]
        k_part = tl.load(k_at, mask=seen & (dim < D)[None, :], other=0.0)
        logits = tl.dot(k_part, tl.trans(q), input_precision=PRECISION)
        for chunk in range(CHUNK, DIMS, CHUNK):
            inside = (dim + chunk < D)[None, :]
            q_mask = inside if WHOLE else exists[:, None] & inside
            q = tl.load(q_at + chunk, mask=q_mask, other=0.0)
            k_part = tl.load(k_at + chunk, mask=seen & inside, other=0.0)
            logits = tl.dot(k_part, tl.trans(q), logits, input_precision=PRECISION)
    logits = logits * scale - lse[None, :]
    if MASKED:
        logits = tl.where(index[None, :] + past >= key[:, None], logits, float("-inf"))
    return tl.sum(tl.exp2(logits), 1)


@triton.jit(do_not_specialize=["queries", "tokens", "start", "stride"])
@no_type_check
def mass_kernel(
    Q, K, LSE, VALID, FIRST, OUT, scale, q_row, q_head, q_stride, k_row, k_head, k_stride, lse_row, lse_head,
    lse_stride, valid_row, queries, tokens, start, stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_FIRST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query head of one row (`HEADS` of them), one block of the keys that its group shares."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // HEADS, pair % HEADS
    past = tokens - queries
    begin = start
    if HAS_FIRST:
        begin = start + tl.load(FIRST + row).to(tl.int32)
    left = tl.program_id(1) * BLOCK_K
    key = left + tl.arange(0, BLOCK_K)
    keys = K + row * k_row + head // GROUP * k_head
    dim = tl.arange(0, CHUNK)
    k_mask = (key < tokens)[:, None] & (dim < D)[None, :]
    k = tl.load(keys + key.to(tl.int64)[:, None] * k_stride + dim[None, :], mask=k_mask, other=0.0)
    # Of the counted queries, those before `sees_one` see no key of the block, and those from `sees_all` on see all.
    counted = tl.cdiv(tl.maximum(queries - begin, 0), stride)
    last = tl.minimum(left + BLOCK_K, tokens) - 1
    sees_one = tl.minimum(tl.cdiv(tl.maximum(left - past - begin, 0), stride), counted)
    sees_all = tl.minimum(tl.cdiv(tl.maximum(last - past - begin, 0), stride), counted)
    middle = tl.minimum(sees_one + tl.cdiv(sees_all - sees_one, BLOCK_Q) * BLOCK_Q, counted)
    whole = middle + (counted - middle) // BLOCK_Q * BLOCK_Q
    q, lse, valid = Q + row * q_row + head * q_head, LSE + row * lse_row + head * lse_head, VALID + row * valid_row
    mass = tl.zeros([BLOCK_K], tl.float32)
    for at in range(sees_one, middle, BLOCK_Q):
        mass += _tile_mass(
            k, keys, q, lse, valid, scale, k_stride, q_stride, lse_stride, queries, tokens, begin, stride, at, key,
            D, DIMS, CHUNK, HAS_VALID, True, False, BLOCK_Q, PRECISION,
        )  # fmt: skip
    for at in range(middle, whole, BLOCK_Q):
        mass += _tile_mass(
            k, keys, q, lse, valid, scale, k_stride, q_stride, lse_stride, queries, tokens, begin, stride, at, key,
            D, DIMS, CHUNK, HAS_VALID, False, True, BLOCK_Q, PRECISION,
        )  # fmt: skip
    if whole < counted:
        mass += _tile_mass(
            k, keys, q, lse, valid, scale, k_stride, q_stride, lse_stride, queries, tokens, begin, stride, whole, key,
            D, DIMS, CHUNK, HAS_VALID, False, False, BLOCK_Q, PRECISION,
        )  # fmt: skip
    if HAS_VALID:
        mass = tl.where(tl.load(valid + key, mask=key < tokens, other=0) != 0, mass, 0.0)
    tl.store(OUT + pair * tokens + key, mass, mask=key < tokens)


def blocks(head_dim: int, itemsize: int, hopper: bool) -> dict[str, int]:
    """Keys and queries of a tile, dimensions that are loaded at a time, warps and stages.

    A program's shared memory stays below 96 KiB. Half precision keeps its keys; float32 reads them again and again.
    """
    dims = powers(head_dim)
    if itemsize > 2:
        return {"BLOCK_K": 64, "BLOCK_Q": 32, "CHUNK": min(dims, 32), "num_warps": 8, "num_stages": 2}
    if dims <= 128:
        if hopper:
            return {"BLOCK_K": 128, "BLOCK_Q": 64, "CHUNK": dims, "num_warps": 8, "num_stages": 3}
        return {"BLOCK_K": 128, "BLOCK_Q": 32, "CHUNK": dims, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_K": 64, "BLOCK_Q": 32, "CHUNK": dims, "num_warps": 8, "num_stages": 2}


def mass(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    scaling: float,
    valid: Tensor | None,
    first: Tensor | None,
    stride: int,
    start: int,
) -> Tensor:
    """Attention mass as in `attention_mass`."""
    (batch, heads, queries, head_dim), (kv_heads, tokens) = query.shape, keys.shape[1:3]
    query, keys, lse = launching(query.to(keys.dtype)), launching(keys), lse.float()
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=keys.device)
    tile: dict[str, Any] = blocks(head_dim, keys.element_size(), is_hopper(keys.device))
    mass_kernel[(batch * heads, triton.cdiv(tokens, tile["BLOCK_K"]))](
        query,
        keys,
        lse,
        lse if valid is None else valid.contiguous().view(torch.uint8),
        lse if first is None else first.long(),
        out,
        scaling * _LOG2_E.value,
        *query.stride()[:3],
        *keys.stride()[:3],
        *lse.stride(),
        0 if valid is None else tokens,
        queries,
        tokens,
        start,
        stride,
        HEADS=heads,
        GROUP=heads // kv_heads,
        D=head_dim,
        DIMS=powers(head_dim),
        HAS_VALID=valid is not None,
        HAS_FIRST=first is not None,
        PRECISION="tf32x3" if keys.dtype == torch.float32 else "ieee",
        **tile,
    )
    return out if heads == kv_heads else out.view(batch, kv_heads, -1, tokens).sum(2)
