"""Attention of one query over quantized slots, in Triton: codes are decoded in registers, where they are needed."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import launching, powers
from kvcompress.kernels.triton_decode import attend_splits, merge_splits, splits_of, strides_over_heads
from kvcompress.kernels.triton_decode import blocks as dense_blocks


@triton.jit
@no_type_check
def _numbers(data, PART: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr):
    """The codes of one part of a slot's dimensions as float32."""
    bits = data.to(tl.int32)
    if FLOAT8:  # sign, exponent and mantissa at their place in float32, and a factor for the other bias
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36
    code = (bits >> (PART * BITS)) & ((1 << BITS) - 1)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # cheaper than converting


@triton.jit
@no_type_check
def _plain(data, PART: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, BASE: tl.constexpr, DTYPE: tl.constexpr):
    """The codes of one part of a slot's dimensions, `BASE` more than they are, in a dtype that holds them exactly.

    Half precision has room for four bits in the mantissa of `BASE`, so that nothing has to be converted.
    """
    if BASE == 0:
        return _numbers(data, PART, BITS, FLOAT8).to(DTYPE)
    else:
        code = (data.to(tl.int16) >> (PART * BITS)) & ((1 << BITS) - 1)
        return (code | (0x4300 if BASE == 128 else 0x6400)).to(DTYPE, bitcast=True)


@triton.jit
@no_type_check
def _decoded(
    data, SCALE, SHIFT, row, row_stride, dim, PART: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Keys or values of one part of the dimensions; `SHARED` neighbouring dimensions have one scale."""
    number = _numbers(data, PART, BITS, FLOAT8)
    if SHARED % WIDTH == 0:
        at = row * row_stride + (PART * WIDTH) // SHARED
    else:
        at = row * row_stride + (PART * WIDTH + dim) // SHARED
    number = number * tl.load(SCALE + at).to(tl.float32)
    if HAS_SHIFT:
        number = number - tl.load(SHIFT + at).to(tl.float32)
    return number.to(SCALE.dtype.element_ty)


@triton.jit
@no_type_check
def _logits(
    q, data, SCALE, SHIFT, row, row_stride, dim, PART: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    SHARED: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr, BASE: tl.constexpr,
    ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries and the keys of one part of the dimensions.

    A scale that all slots of the tile share for a dimension goes into the query, one that the dimensions of a slot
    share into the products: then the codes are multiplied as they are. In float32 registers have no room for that.
    """
    HALF: tl.constexpr = q.dtype.primitive_bitwidth == 16
    if HALF and ONE_ROW and SHARED == 1:
        at = row * row_stride + tl.minimum(PART * WIDTH + dim, D - 1)
        wide = q.to(tl.float32)
        scaled = (wide * tl.load(SCALE + at).to(tl.float32)[None, :]).to(q.dtype)
        shift = tl.sum(scaled.to(tl.float32), 1) * BASE
        if HAS_SHIFT:
            shift += tl.sum(wide * tl.load(SHIFT + at).to(tl.float32)[None, :], 1)
        codes = _plain(data, PART, BITS, FLOAT8, BASE, q.dtype)
        return tl.dot(scaled, codes, input_precision=PRECISION) - shift[:, None]
    elif HALF and SHARED % WIDTH == 0:
        at = row * row_stride + (PART * WIDTH) // SHARED
        total = tl.sum(q.to(tl.float32), 1)[:, None]
        codes = _plain(data, PART, BITS, FLOAT8, BASE, q.dtype)
        products = tl.dot(q, codes, input_precision=PRECISION) - total * BASE
        products = products * tl.load(SCALE + at).to(tl.float32)
        if HAS_SHIFT:
            products -= total * tl.load(SHIFT + at).to(tl.float32)
        return products
    else:
        k = _decoded(data, SCALE, SHIFT, row, row_stride, dim[:, None], PART, WIDTH, SHARED, BITS, FLOAT8, HAS_SHIFT)
        return tl.dot(q, k.to(q.dtype), input_precision=PRECISION)


@triton.jit
@no_type_check
def _weighted(
    p, data, SCALE, SHIFT, row, row_stride, dim, PART: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the values of one part of the dimensions, weighted; a scale of a whole slot goes into the weights."""
    DTYPE: tl.constexpr = SCALE.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16 and SHARED % WIDTH == 0:
        at = row * row_stride + (PART * WIDTH) // SHARED
        scaled = (p * tl.load(SCALE + at).to(tl.float32)[None, :]).to(DTYPE)
        shift = tl.sum(scaled.to(tl.float32), 1) * BASE
        if HAS_SHIFT:
            shift += tl.sum(p * tl.load(SHIFT + at).to(tl.float32)[None, :], 1)
        codes = _plain(data, PART, BITS, FLOAT8, BASE, DTYPE)
        return tl.dot(scaled, codes, input_precision=PRECISION) - shift[:, None]
    else:
        v = _decoded(
            data, SCALE, SHIFT, row[:, None], row_stride, dim[None, :], PART, WIDTH, SHARED, BITS, FLOAT8, HAS_SHIFT
        )
        return tl.dot(p.to(DTYPE), v, input_precision=PRECISION)


@triton.jit(do_not_specialize=["slots", "splits"])
@no_type_check
def codes_kernel(  # noqa: C901  (most branches are of the compiler: constants decide them)
    Q, K, K_SCALE, K_SHIFT, K_ROWS, V, V_SCALE, V_SHIFT, V_ROWS, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head,
    k_row, k_head, k_slot, ks_row, ks_head, ks_slot, kr_row, kr_head, v_row, v_head, v_slot, vs_row, vs_head, vs_slot,
    vr_row, vr_head, length_row, length_head, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    DIMS: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr, K_HAS_ROWS: tl.constexpr,
    V_HAS_ROWS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr, K_SHARED: tl.constexpr,
    V_SHARED: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_START: tl.constexpr, BLOCK: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row (`HEADS` of them), one share of its coded slots in use.

    A byte holds a number of each of `D / WIDTH` parts of a slot's dimensions; `DIMS` covers `WIDTH`. Without rows of
    their own, `K_SLOTS` and `V_SLOTS` neighbouring slots have one row of scales. Reads outside of a share or a slot are
    moved inside, where they are finite, and their results are left out. Where rows and heads have different numbers of
    slots, `START` says where in the one row of all of them each begins.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // HEADS, pair % HEADS
    ONE_ROW: tl.constexpr = not K_HAS_ROWS and K_SLOTS % BLOCK == 0  # of scales, for the keys of a tile
    used = slots
    if HAS_LENGTH:
        used = tl.minimum(tl.load(LENGTH + row * length_row + head * length_head).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(used, splits), BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, used)
    member, place = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIMS)
    if WIDTH == DIMS and Q.dtype.element_ty.primitive_bitwidth == 16:  # bytes are read 16 at a time
        dim = place
    else:  # float32 has no registers for that
        dim = tl.minimum(place, WIDTH - 1)
    q_at = Q + row * q_row + (head * GROUP + member[:, None]) * q_head + place[None, :]
    q_mask = (member < GROUP)[:, None] & (place < WIDTH)[None, :]
    q_0 = tl.load(q_at, mask=q_mask, other=0.0)
    if BITS <= 4:
        q_1 = tl.load(q_at + WIDTH, mask=q_mask & (place + WIDTH < D)[None, :], other=0.0)
    if BITS <= 2:
        q_2 = tl.load(q_at + 2 * WIDTH, mask=q_mask & (place + 2 * WIDTH < D)[None, :], other=0.0)
        q_3 = tl.load(q_at + 3 * WIDTH, mask=q_mask & (place + 3 * WIDTH < D)[None, :], other=0.0)
    keys, values = K + row * k_row + head * k_head, V + row * v_row + head * v_head
    k_scale, k_shift = K_SCALE + row * ks_row + head * ks_head, K_SHIFT + row * ks_row + head * ks_head
    v_scale, v_shift = V_SCALE + row * vs_row + head * vs_head, V_SHIFT + row * vs_row + head * vs_head
    k_rows, v_rows = K_ROWS + row * kr_row + head * kr_head, V_ROWS + row * vr_row + head * vr_head
    if HAS_START:
        begin = tl.load(START + pair).to(tl.int64)
        keys, values = keys + begin * k_slot, values + begin * v_slot
        if K_HAS_ROWS:
            k_rows += begin
        else:
            k_scale, k_shift = k_scale + begin // K_SLOTS * ks_slot, k_shift + begin // K_SLOTS * ks_slot
        if V_HAS_ROWS:
            v_rows += begin
        else:
            v_scale, v_shift = v_scale + begin // V_SLOTS * vs_slot, v_shift + begin // V_SLOTS * vs_slot
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sum_0 = tl.zeros([GROUP_BLOCK, DIMS], tl.float32)
    sum_1 = tl.zeros([GROUP_BLOCK, DIMS], tl.float32)
    sum_2 = tl.zeros([GROUP_BLOCK, DIMS], tl.float32)
    sum_3 = tl.zeros([GROUP_BLOCK, DIMS], tl.float32)
    for first in range(start, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < end
        slot = tl.minimum(slot, end - 1).to(tl.int64)
        if K_HAS_ROWS:
            k_at = tl.load(k_rows + slot).to(tl.int64)[None, :]
        elif ONE_ROW:
            k_at = first // K_SLOTS
        else:
            k_at = (slot // K_SLOTS)[None, :]
        v_at = tl.load(v_rows + slot).to(tl.int64) if V_HAS_ROWS else slot // V_SLOTS
        data = tl.load(keys + slot[None, :] * k_slot + dim[:, None])
        logits = _logits(
            q_0, data, k_scale, k_shift, k_at, ks_slot, dim, 0, WIDTH, D, K_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
            ONE_ROW, PRECISION,
        )  # fmt: skip
        if BITS <= 4:
            logits += _logits(
                q_1, data, k_scale, k_shift, k_at, ks_slot, dim, 1, WIDTH, D, K_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                ONE_ROW, PRECISION,
            )  # fmt: skip
        if BITS <= 2:
            logits += _logits(
                q_2, data, k_scale, k_shift, k_at, ks_slot, dim, 2, WIDTH, D, K_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                ONE_ROW, PRECISION,
            )  # fmt: skip
            logits += _logits(
                q_3, data, k_scale, k_shift, k_at, ks_slot, dim, 3, WIDTH, D, K_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                ONE_ROW, PRECISION,
            )  # fmt: skip
        logits = tl.where(inside[None, :], logits * scale, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        p, keep = tl.exp(logits - new[:, None]), tl.exp(top - new)
        total, top = total * keep + tl.sum(p, 1), new
        data = tl.load(values + slot[:, None] * v_slot + dim[None, :])
        sum_0 = sum_0 * keep[:, None] + _weighted(
            p, data, v_scale, v_shift, v_at, vs_slot, dim, 0, WIDTH, V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE, PRECISION
        )
        if BITS <= 4:
            sum_1 = sum_1 * keep[:, None] + _weighted(
                p, data, v_scale, v_shift, v_at, vs_slot, dim, 1, WIDTH, V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                PRECISION,
            )  # fmt: skip
        if BITS <= 2:
            sum_2 = sum_2 * keep[:, None] + _weighted(
                p, data, v_scale, v_shift, v_at, vs_slot, dim, 2, WIDTH, V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                PRECISION,
            )  # fmt: skip
            sum_3 = sum_3 * keep[:, None] + _weighted(
                p, data, v_scale, v_shift, v_at, vs_slot, dim, 3, WIDTH, V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE,
                PRECISION,
            )  # fmt: skip
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    at = (split * tl.num_programs(0) + pair) * GROUP + member
    out = OUT + at[:, None] * D + place[None, :]
    tl.store(out, sum_0 / total[:, None], mask=q_mask)
    if BITS <= 4:
        tl.store(out + WIDTH, sum_1 / total[:, None], mask=q_mask & (place + WIDTH < D)[None, :])
    if BITS <= 2:
        tl.store(out + 2 * WIDTH, sum_2 / total[:, None], mask=q_mask & (place + 2 * WIDTH < D)[None, :])
        tl.store(out + 3 * WIDTH, sum_3 / total[:, None], mask=q_mask & (place + 3 * WIDTH < D)[None, :])
    tl.store(LSE + at, tl.where(seen, top + tl.log(total), float("-inf")), mask=member < GROUP)


def blocks(width: int, itemsize: int, head_dim: int) -> dict[str, int]:
    """Slots of a tile, warps and stages, for slots of `width` bytes that are numbers of `itemsize` bytes in kernels.

    A thread holds so few codes of a tile, and sums of values, that all of them stay in registers.
    """
    block = min(64, max(16, 8192 // (powers(width) * itemsize)))
    return {"BLOCK": block, "num_warps": 4 if powers(width) <= 64 and head_dim <= 128 else 8, "num_stages": 2}


def base(bits: int, dtype: torch.dtype) -> int:
    """What codes are raised by where kernels multiply them, so that their bits are those of numbers: 0 for nothing."""
    raised = {torch.bfloat16: 128, torch.float16: 1024}
    return raised.get(dtype, 0) if bits <= 4 else 0


def _alike(scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and shifts that one set of strides serves; stores keep them so."""
    if scale.stride(3) == 1 and (shift is None or shift.stride() == scale.stride()):
        return scale, shift
    return scale.contiguous(), None if shift is None else shift.contiguous()


def _strides(tensor: Tensor | None, start: Tensor | None) -> tuple[int, ...]:
    """Steps from one row, head and slot to the next; one row and head stands for all where heads begin at `start`."""
    if tensor is None:
        return (0, 0, 0)
    return tensor.stride()[:3] if start is None else (0, 0, tensor.stride(2))


def decode_codes(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_shift: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_shift: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    coded: Tensor | None,
    length: Tensor | None,
    key_rows: Tensor | None,
    value_rows: Tensor | None,
    code_start: Tensor | None = None,
    code_slots: int = 0,
    start: Tensor | None = None,
    slots: int = 0,
) -> Tensor:
    """Attention as in `decode_attention_codes`: shares of coded slots, shares of the others, and one merge."""
    (batch, heads, _, head_dim), (kv_heads, all_slots, width) = query.shape, key_codes.shape[1:4]
    if code_start is None:
        code_slots = all_slots
    else:
        kv_heads = code_start.shape[1]
    most = keys.shape[2] if start is None else slots
    query, device, group = launching(query), keys.device, heads // kv_heads
    tile: dict[str, Any] = blocks(width, query.element_size(), head_dim)
    dense_tile = dense_blocks(head_dim, head_dim, query.element_size())["BLOCK"]
    of_codes = splits_of(batch * kv_heads, code_slots, tile["BLOCK"], device)
    of_dense = splits_of(batch * kv_heads, most, dense_tile, device) if most else 0
    parts = torch.empty(of_codes + of_dense, batch * heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(of_codes + of_dense, batch * heads, dtype=torch.float32, device=device)
    float8, bits = key_codes.dtype == torch.float8_e4m3fn, 8 // -(-head_dim // width)
    key_data, value_data = (launching(codes.view(torch.uint8)) for codes in (key_codes, value_codes))
    (key_scale, key_shift), (value_scale, value_shift) = _alike(key_scale, key_shift), _alike(value_scale, value_shift)
    codes_kernel[(batch * kv_heads, of_codes)](
        query,
        key_data,
        key_scale,
        key_scale if key_shift is None else key_shift,
        key_data if key_rows is None else key_rows,
        value_data,
        value_scale,
        value_scale if value_shift is None else value_shift,
        value_data if value_rows is None else value_rows,
        lse if coded is None else coded,
        lse if code_start is None else code_start,
        parts,
        lse,
        scaling,
        code_slots,
        *query.stride()[:2],
        *_strides(key_data, code_start),
        *_strides(key_scale, code_start),
        *_strides(key_rows, code_start)[:2],
        *_strides(value_data, code_start),
        *_strides(value_scale, code_start),
        *_strides(value_rows, code_start)[:2],
        *strides_over_heads(coded),
        of_codes,
        HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=powers(group),
        D=head_dim,
        WIDTH=width,
        DIMS=powers(width),
        BITS=bits,
        FLOAT8=float8,
        BASE=0 if float8 else base(bits, query.dtype),
        HAS_SHIFT=key_shift is not None,
        K_HAS_ROWS=key_rows is not None,
        V_HAS_ROWS=value_rows is not None,
        K_SLOTS=1 if key_rows is not None else all_slots // key_scale.shape[2],
        V_SLOTS=1 if value_rows is not None else all_slots // value_scale.shape[2],
        K_SHARED=head_dim // key_scale.shape[3],
        V_SHARED=head_dim // value_scale.shape[3],
        HAS_LENGTH=coded is not None,
        HAS_START=code_start is not None,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
        **tile,
    )
    if of_dense:
        dense_parts, dense_lse = parts[of_codes:], lse[of_codes:]
        attend_splits(query.squeeze(2), keys, values, scaling, length, of_dense, dense_parts, dense_lse, start, slots)
    out = torch.empty(batch, heads, 1, head_dim, dtype=query.dtype, device=device)
    merge_splits(parts, lse, out.view(batch * heads, -1))
    return out
