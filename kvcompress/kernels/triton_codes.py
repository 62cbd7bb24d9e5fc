"""Attention of one query over quantized slots, in Triton: codes are decoded in registers, where they are needed."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import launching, powers
from kvcompress.kernels.triton_decode import attend_splits, merge_splits, splits_of, strides_over_heads
from kvcompress.kernels.triton_decode import blocks as dense_blocks
from kvcompress.kernels.triton_parts import excess_of_part, logits_of_part, weighted_of_part

_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST_COLUMNS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4) else 16  # of a product in Triton


@triton.jit(do_not_specialize=["slots", "splits"])
@no_type_check
def codes_kernel(  # noqa: C901  (most branches are of the compiler: constants decide them)
    Q, K, K_SCALE, K_SHIFT, K_ROWS, V, V_SCALE, V_SHIFT, V_ROWS, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head,
    k_row, k_head, k_slot, ks_row, ks_head, ks_slot, kr_row, kr_head, v_row, v_head, v_slot, vs_row, vs_head, vs_slot,
    vr_row, vr_head, length_row, length_head, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, PLACES: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr,
    K_HAS_ROWS: tl.constexpr, V_HAS_ROWS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    K_SHARED: tl.constexpr, V_SHARED: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_START: tl.constexpr,
    BLOCK: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row (`HEADS` of them), one share of its coded slots in use.

    `PLACES` words of `STEP` bytes cover `UNIT` bytes of a slot; `triton_parts` says which numbers a word holds.

    Slots and dimensions are the rows of every product, queries its columns, so that a group of a few heads costs a few
    columns. Without rows of their own, `K_SLOTS` and `V_SLOTS` neighbouring slots have one row of scales. Reads outside
    of a share or a slot are moved inside, where they are finite, and their results are left out. Where rows and heads
    have different numbers of slots, `START` says where in the one row of all of them each begins.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // HEADS, pair % HEADS
    ONE_ROW: tl.constexpr = not K_HAS_ROWS and K_SLOTS % BLOCK == 0  # of scales, for the keys of a tile
    PARTS: tl.constexpr = STEP * 8 // BITS if BITS < 8 else STEP * ((D + UNIT - 1) // UNIT)
    FOLDED: tl.constexpr = V_SCALE.dtype.element_ty.primitive_bitwidth == 16 and V_SHARED % UNIT == 0
    used = slots
    if HAS_LENGTH:
        used = tl.minimum(tl.load(LENGTH + row * length_row + head * length_head).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(used, splits), BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, used)
    member, place = tl.arange(0, GROUP_BLOCK), tl.arange(0, PLACES)
    dim, is_place, is_member = STEP * place, STEP * place < UNIT, member < GROUP
    if STEP * PLACES != UNIT:
        place = tl.minimum(place, UNIT // STEP - 1)
    q_at = Q + row * q_row + (head * GROUP + member[None, :]) * q_head + dim[:, None]
    q_mask = is_place[:, None] & is_member[None, :]
    SECOND: tl.constexpr = UNIT if STEP == 1 else 1  # where the dimensions of parts begin
    THIRD: tl.constexpr = 2 * UNIT if STEP == 1 else UNIT
    FOURTH: tl.constexpr = 3 * UNIT if STEP == 1 else UNIT + 1
    q_0 = tl.load(q_at, mask=q_mask, other=0.0)
    if PARTS > 1:
        q_1 = tl.load(q_at + SECOND, mask=q_mask & (dim + SECOND < D)[:, None], other=0.0)
    if PARTS > 2:
        q_2 = tl.load(q_at + THIRD, mask=q_mask & (dim + THIRD < D)[:, None], other=0.0)
        q_3 = tl.load(q_at + FOURTH, mask=q_mask & (dim + FOURTH < D)[:, None], other=0.0)
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
    sum_0 = tl.zeros([PLACES, GROUP_BLOCK], tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    excess_0 = tl.zeros([16, GROUP_BLOCK], tl.float32)
    excess_1, excess_2, excess_3 = excess_0, excess_0, excess_0
    for first in range(start, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < end
        slot = tl.minimum(slot, end - 1).to(tl.int64)
        if K_HAS_ROWS:
            k_at = tl.load(k_rows + slot).to(tl.int64)[:, None]
        elif ONE_ROW:
            k_at = first // K_SLOTS
        else:
            k_at = (slot // K_SLOTS)[:, None]
        v_at = tl.load(v_rows + slot).to(tl.int64) if V_HAS_ROWS else slot // V_SLOTS
        words_at = keys + slot[:, None] * k_slot + place[None, :]
        words = tl.load(words_at)
        logits = tl.zeros([BLOCK, GROUP_BLOCK], tl.float32)
        offset = tl.zeros([16, GROUP_BLOCK], tl.float32)
        logits, offset = logits_of_part(
            logits, offset, q_0, words, k_scale, k_shift, k_at, ks_slot, place, 0, STEP, UNIT, D, K_SHARED, BITS,
            FLOAT8, HAS_SHIFT, BASE, ONE_ROW, PRECISION, ASSEMBLY,
        )  # fmt: skip
        if PARTS > 1:
            logits, offset = logits_of_part(
                logits, offset, q_1, words, k_scale, k_shift, k_at, ks_slot, place, 1, STEP, UNIT, D, K_SHARED, BITS,
                FLOAT8, HAS_SHIFT, BASE, ONE_ROW, PRECISION, ASSEMBLY,
            )  # fmt: skip
        if PARTS > 2:
            if BITS == 8:
                words = tl.load(words_at + PLACES)
            logits, offset = logits_of_part(
                logits, offset, q_2, words, k_scale, k_shift, k_at, ks_slot, place, 2, STEP, UNIT, D, K_SHARED, BITS,
                FLOAT8, HAS_SHIFT, BASE, ONE_ROW, PRECISION, ASSEMBLY,
            )  # fmt: skip
            logits, offset = logits_of_part(
                logits, offset, q_3, words, k_scale, k_shift, k_at, ks_slot, place, 3, STEP, UNIT, D, K_SHARED, BITS,
                FLOAT8, HAS_SHIFT, BASE, ONE_ROW, PRECISION, ASSEMBLY,
            )  # fmt: skip
        logits = (logits - tl.max(offset, 0)[None, :]) * (scale * _LOG2_E)
        logits = tl.where(inside[:, None], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 0))
        p, keep = tl.exp2(logits - new[None, :]), tl.exp2(top - new)
        total, top = total * keep + tl.sum(p, 0), new
        words_at = values + slot[None, :] * v_slot + place[:, None]
        words = tl.load(words_at)
        scales, shifts = p, p
        if FOLDED:
            column = v_at[:, None] * vs_slot + tl.arange(0, D // V_SHARED)[None, :]
            scales = tl.load(v_scale + column)
            shifts = tl.load(v_shift + column)
        sum_0 = weighted_of_part(
            sum_0 * keep[None, :], p, words, v_scale, v_shift, scales, v_at, vs_slot, place, 0, STEP, UNIT,
            V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE, FOLDED, PRECISION, ASSEMBLY,
        )  # fmt: skip
        excess_0 = excess_of_part(excess_0 * keep[None, :], p, scales, shifts, 0, BITS, HAS_SHIFT, BASE, FOLDED)
        if PARTS > 1:
            sum_1 = weighted_of_part(
                sum_1 * keep[None, :], p, words, v_scale, v_shift, scales, v_at, vs_slot, place, 1, STEP, UNIT,
                V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE, FOLDED, PRECISION, ASSEMBLY,
            )  # fmt: skip
            excess_1 = excess_of_part(
                excess_1 * keep[None, :], p, scales, shifts, UNIT // V_SHARED, BITS, HAS_SHIFT, BASE, FOLDED
            )
        if PARTS > 2:
            if BITS == 8:
                words = tl.load(words_at + PLACES)
            sum_2 = weighted_of_part(
                sum_2 * keep[None, :], p, words, v_scale, v_shift, scales, v_at, vs_slot, place, 2, STEP, UNIT,
                V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE, FOLDED, PRECISION, ASSEMBLY,
            )  # fmt: skip
            sum_3 = weighted_of_part(
                sum_3 * keep[None, :], p, words, v_scale, v_shift, scales, v_at, vs_slot, place, 3, STEP, UNIT,
                V_SHARED, BITS, FLOAT8, HAS_SHIFT, BASE, FOLDED, PRECISION, ASSEMBLY,
            )  # fmt: skip
            if STEP == 1:
                excess_2 = excess_of_part(
                    excess_2 * keep[None, :], p, scales, shifts, 2 * UNIT // V_SHARED, BITS, HAS_SHIFT, BASE, FOLDED
                )
                excess_3 = excess_of_part(
                    excess_3 * keep[None, :], p, scales, shifts, 3 * UNIT // V_SHARED, BITS, HAS_SHIFT, BASE, FOLDED
                )
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    at = (split * tl.num_programs(0) + pair) * GROUP + member
    out = OUT + at[None, :] * D + dim[:, None]
    if STEP == 2:  # two parts share each scale
        excess_3, excess_2, excess_1 = excess_1, excess_1, excess_0
    tl.store(out, (sum_0 - tl.max(excess_0, 0)[None, :]) / total[None, :], mask=q_mask)
    if PARTS > 1:
        mask = q_mask & (dim + SECOND < D)[:, None]
        tl.store(out + SECOND, (sum_1 - tl.max(excess_1, 0)[None, :]) / total[None, :], mask=mask)
    if PARTS > 2:
        mask = q_mask & (dim + THIRD < D)[:, None]
        tl.store(out + THIRD, (sum_2 - tl.max(excess_2, 0)[None, :]) / total[None, :], mask=mask)
        mask = q_mask & (dim + FOURTH < D)[:, None]
        tl.store(out + FOURTH, (sum_3 - tl.max(excess_3, 0)[None, :]) / total[None, :], mask=mask)
    lse = (top + tl.log2(total)) / _LOG2_E
    tl.store(LSE + at, tl.where(seen, lse, float("-inf")), mask=is_member)


def columns(group: int) -> int:
    """Columns of a product that are queries, for the query heads of a group."""
    return max(_LEAST_COLUMNS, 1 << (group - 1).bit_length())


def words_of(head_dim: int, bits: int, float8: bool, dtype: torch.dtype) -> dict[str, int]:
    """How kernels read a slot: bytes of a word, bytes that have words of their own, how many words cover those, `BASE`.

    `BASE` is what codes are raised by, so that their bits are those of numbers: four bits of them, or either half of
    eight, from words of two bytes; 0 where they are converted.
    """
    base = 0 if float8 else {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0)
    if bits == 8 and base and head_dim in (64, 128):
        return {"STEP": 2, "UNIT": 64, "PLACES": 32, "BASE": base}
    unit, base = -(-head_dim * bits // 8), base if bits < 8 else 0
    step = 2 if bits == 4 and base and head_dim % 4 == 0 else 1
    return {"STEP": step, "UNIT": unit, "PLACES": powers(unit // step), "BASE": base}


def blocks(head_dim: int, columns: int, bits: int, base: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Slots of a tile, warps and stages, and how many such programs a processor of the device has registers for.

    Where the registers of one warp have room for all sums, it works alone: then warps exchange nothing.
    """
    if dtype.itemsize == 4:
        return {"BLOCK": min(64, max(16, 4096 // powers(head_dim))), "num_warps": 4, "num_stages": 2}, 2
    if powers(head_dim) * columns > 1024:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 2}, 2
    if base == 0:
        return {"BLOCK": 64, "num_warps": 2, "num_stages": 2}, 6
    return {"BLOCK": 64, "num_warps": 1, "num_stages": 3 if bits < 8 else 2}, 8


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
    float8, bits = key_codes.dtype == torch.float8_e4m3fn, 8 // -(-head_dim // width)
    words, queries = words_of(head_dim, bits, float8, query.dtype), columns(group)
    tile, programs = blocks(head_dim, queries, bits, words["BASE"], query.dtype)
    dense_tile = dense_blocks(head_dim, head_dim, query.element_size())["BLOCK"]
    of_codes = splits_of(batch * kv_heads, code_slots, tile["BLOCK"], device, programs)
    of_dense = splits_of(batch * kv_heads, most, dense_tile, device) if most else 0
    parts = torch.empty(of_codes + of_dense, batch * heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(of_codes + of_dense, batch * heads, dtype=torch.float32, device=device)
    read_as = torch.int16 if words["STEP"] == 2 else torch.uint8
    key_data, value_data = (launching(codes).view(read_as) for codes in (key_codes, value_codes))
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
        GROUP_BLOCK=queries,
        D=head_dim,
        **words,
        BITS=bits,
        FLOAT8=float8,
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
        ASSEMBLY=words["STEP"] == 2 and device.type == "cuda",
        **tile,
    )
    if of_dense:
        dense_parts, dense_lse = parts[of_codes:], lse[of_codes:]
        attend_splits(query.squeeze(2), keys, values, scaling, length, of_dense, dense_parts, dense_lse, start, slots)
    out = torch.empty(batch, heads, 1, head_dim, dtype=query.dtype, device=device)
    merge_splits(parts, lse, out.view(batch * heads, -1))
    return out
