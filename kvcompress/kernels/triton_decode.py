"""Attention of one query over the slots in use, in Triton: each program takes a share of a head's slots (split-K)."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import launching, multiprocessors, powers

_MOST_SPLITS = 128


@triton.jit
@no_type_check
def share_of(
    LENGTH, slots, length_row, length_head, row, head, split, splits, HAS_LENGTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first slot of share `split` of a head's slots in use, and the one after its last."""
    used = slots
    if HAS_LENGTH:
        used = tl.minimum(tl.load(LENGTH + row * length_row + head * length_head).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(used, splits), BLOCK) * BLOCK
    return split * share, tl.minimum(split * share + share, used)


@triton.jit
@no_type_check
def dense_share(
    Q, K, V, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,
    length_row, length_head, pair, split, splits, part,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr, VALUE_D: tl.constexpr, VALUE_DIMS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_START: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over share `split` of the slots in use of one key/value head of one row, written as `part`."""
    row, head = pair // HEADS, pair % HEADS
    start, end = share_of(LENGTH, slots, length_row, length_head, row, head, split, splits, HAS_LENGTH, BLOCK)
    member, dim, value_dim = tl.arange(0, GROUP_BLOCK), tl.arange(0, CHUNK), tl.arange(0, VALUE_DIMS)
    q_at = Q + row * q_row + (head * GROUP + member[:, None]) * q_head + dim[None, :]
    q = tl.load(q_at, mask=(member < GROUP)[:, None] & (dim < D)[None, :], other=0.0)
    if HAS_START:  # buffers without gaps
        begin = tl.load(START + pair).to(tl.int64)
        keys, values = K + begin * k_slot, V + begin * v_slot
    else:
        keys, values = K + row * k_row + head * k_head, V + row * v_row + head * v_head
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    summed = tl.zeros([GROUP_BLOCK, VALUE_DIMS], tl.float32)
    for first in range(start, end, BLOCK):
        slot = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = slot < end
        k_at = keys + slot[None, :] * k_slot + dim[:, None]
        k = tl.load(k_at, mask=inside[None, :] & (dim < D)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION)
        for chunk in range(CHUNK, DIMS, CHUNK):  # of float32, registers hold no query of many dimensions as a whole
            q_mask = (member < GROUP)[:, None] & (dim + chunk < D)[None, :]
            q_part = tl.load(q_at + chunk, mask=q_mask, other=0.0)
            k = tl.load(k_at + chunk, mask=inside[None, :] & (dim + chunk < D)[:, None], other=0.0)
            logits = tl.dot(q_part, k, logits, input_precision=PRECISION)
        logits = tl.where(inside[None, :], logits * scale, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        p, keep = tl.exp(logits - new[:, None]), tl.exp(top - new)
        v_mask = inside[:, None] & (value_dim < VALUE_D)[None, :]
        v = tl.load(values + slot[:, None] * v_slot + value_dim[None, :], mask=v_mask, other=0.0)
        summed = summed * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total, top = total * keep + tl.sum(p, 1), new
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    at = (part * tl.num_programs(0) + pair) * GROUP + member
    out_mask = (member < GROUP)[:, None] & (value_dim < VALUE_D)[None, :]
    tl.store(OUT + at[:, None] * VALUE_D + value_dim[None, :], summed / total[:, None], mask=out_mask)
    tl.store(LSE + at, tl.where(seen, top + tl.log(total), float("-inf")), mask=member < GROUP)


@triton.jit(do_not_specialize=["slots", "splits"])
@no_type_check
def decode_kernel(
    Q, K, V, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,
    length_row, length_head, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr, VALUE_D: tl.constexpr, VALUE_DIMS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_START: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row (`HEADS` of them), one share of its slots in use."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dense_share(
        Q, K, V, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,
        length_row, length_head, pair, split, splits, split, HEADS, GROUP, GROUP_BLOCK, D, DIMS, CHUNK, VALUE_D,
        VALUE_DIMS, HAS_LENGTH, HAS_START, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "splits"])
@no_type_check
def merge_kernel(
    PARTS, LSE, OUT, heads, splits, D: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One program: one head of one row, some of its dimensions. `SPLITS` covers `splits`."""
    head = tl.program_id(0).to(tl.int64)
    dim, split = tl.program_id(1) * DIMS + tl.arange(0, DIMS), tl.arange(0, SPLITS)
    lse = tl.load(LSE + split * heads + head, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    mask = (split < splits)[:, None] & (dim < D)[None, :]
    parts = tl.load(PARTS + (split[:, None] * heads + head) * D + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(OUT + head * D + dim, out.to(OUT.dtype.element_ty), mask=dim < D)


def blocks(head_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Slots of a tile, key dimensions at a time, warps and stages; a program's shared memory stays below 96 KiB."""
    dims = powers(head_dim)
    wide = max(powers(head_dim), powers(value_dim)) * itemsize  # bytes of a row
    if wide <= 256:
        return {"BLOCK": 64, "CHUNK": dims, "num_warps": 4, "num_stages": 3}
    if wide <= 512:
        return {"BLOCK": 32, "CHUNK": dims, "num_warps": 4, "num_stages": 2}
    return {"BLOCK": 16, "CHUNK": min(dims, 64), "num_warps": 8, "num_stages": 2}


def splits_of(rows: int, slots: int, block: int, device: torch.device, programs: int | None = None) -> int:
    """Shares of a head's slots, from shapes alone: enough for the device, at least two tiles each.

    Args:
        rows: rows times key/value heads.
        slots: slots of the head that has most.
        block: slots of a tile.
        device: which one.
        programs: how many run side by side on a processor, all of which then begin at once; None where it matters
            little, as memory is what they wait for.
    """
    processors = multiprocessors(device)
    shares = -(-4 * processors // rows) if programs is None else programs * processors // rows
    return max(1, min(shares, slots // (2 * block), _MOST_SPLITS))


def merge_splits(parts: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Joins the attention of the same queries over disjoint slots.

    Args:
        parts: output of each share, float32 `[splits, heads, value_dim]`; contiguous, as all of these.
        lse: log-sum-exp of each share, `[splits, heads]`.
        out: where the joined output goes, `[heads, value_dim]` in any dtype; 0 for a head that saw nothing.
    """
    splits, heads, value_dim = parts.shape
    dims = min(64, powers(value_dim))
    grid = (heads, triton.cdiv(value_dim, dims))
    merge_kernel[grid](parts, lse, out, heads, splits, D=value_dim, DIMS=dims, SPLITS=powers(splits), num_warps=4)
    return out


def strides_of(buffer: Tensor | None, start: Tensor | None) -> tuple[int, ...]:
    """Steps from one row, key/value head and slot to the next; one row and head holds all where `start` is given."""
    if buffer is None:
        return (0, 0, 0)
    return buffer.stride()[:3] if start is None else (0, 0, buffer.stride(-2))


def strides_over_heads(length: Tensor | None) -> tuple[int, int]:
    """Steps from one row, and from one key/value head, to the next of `[batch, 1 or kv_heads]` numbers."""
    return (0, 0) if length is None else (length.stride(0), length.stride(1) if length.shape[1] > 1 else 0)


def shape_of(keys: Tensor, start: Tensor | None, most: int) -> tuple[int, int, int]:
    """Rows, key/value heads, and slots of the head that has most."""
    rows, kv_heads = keys.shape[:2] if start is None else start.shape
    return rows, kv_heads, keys.shape[2] if start is None else most


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    length: Tensor | None,
    start: Tensor | None = None,
    slots: int = 0,
) -> Tensor:
    """Attention as in `decode_attention`, over keys and values in the query's dtype."""
    batch, heads, _, head_dim = query.shape
    value_dim = values.shape[-1]
    tile: dict[str, Any] = blocks(head_dim, value_dim, keys.element_size())
    _, kv_heads, most = shape_of(keys, start, slots)
    splits = splits_of(batch * kv_heads, most, tile["BLOCK"], keys.device)
    parts = torch.empty(splits, batch * heads, value_dim, dtype=torch.float32, device=keys.device)
    lse = torch.empty(splits, batch * heads, dtype=torch.float32, device=keys.device)
    query, keys, values = launching(query.squeeze(2)), launching(keys), launching(values)
    decode_kernel[(batch * kv_heads, splits)](
        query,
        keys,
        values,
        lse if length is None else length,
        lse if start is None else start,
        parts,
        lse,
        scaling,
        most,
        *query.stride()[:2],
        *strides_of(keys, start),
        *strides_of(values, start),
        *strides_over_heads(length),
        splits,
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_BLOCK=powers(heads // kv_heads),
        D=head_dim,
        DIMS=powers(head_dim),
        VALUE_D=value_dim,
        VALUE_DIMS=powers(value_dim),
        HAS_LENGTH=length is not None,
        HAS_START=start is not None,
        PRECISION="tf32x3" if keys.dtype == torch.float32 else "ieee",
        **tile,
    )
    out = torch.empty(batch, heads, 1, value_dim, dtype=query.dtype, device=keys.device)
    merge_splits(parts, lse, out.view(batch * heads, -1))
    return out
