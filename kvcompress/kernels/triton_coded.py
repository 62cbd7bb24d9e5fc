"""One share of the coded slots of a head, in Triton: codes are decoded in registers, where they are needed."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from kvcompress.kernels.triton_decode import share_of
from kvcompress.kernels.triton_parts import excess_of_part, logits_of_part, weighted_of_part

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def coded_share(  # noqa: C901  (most branches are of the compiler: constants decide them)
    Q, K, K_SCALE, K_SHIFT, K_ROWS, V, V_SCALE, V_SHIFT, V_ROWS, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head,
    k_row, k_head, k_slot, ks_row, ks_head, ks_slot, kr_row, kr_head, v_row, v_head, v_slot, vs_row, vs_head, vs_slot,
    vr_row, vr_head, length_row, length_head, pair, split, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, PLACES: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr,
    K_HAS_ROWS: tl.constexpr, V_HAS_ROWS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    K_SHARED: tl.constexpr, V_SHARED: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_START: tl.constexpr,
    BLOCK: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Attention over share `split` of the coded slots in use of one key/value head of one row, written as part `split`.

    `PLACES` words of `STEP` bytes cover `UNIT` bytes of a slot; `triton_parts` says which numbers a word holds.

    Slots and dimensions are the rows of every product, queries its columns, so that a group of a few heads costs a few
    columns. Without rows of their own, `K_SLOTS` and `V_SLOTS` neighbouring slots have one row of scales. Reads outside
    of a share or a slot are moved inside, where they are finite, and their results are left out. Where rows and heads
    have different numbers of slots, `START` says where in the one row of all of them each begins.
    """
    row, head = pair // HEADS, pair % HEADS
    ONE_ROW: tl.constexpr = not K_HAS_ROWS and K_SLOTS % BLOCK == 0  # of scales, for the keys of a tile
    PARTS: tl.constexpr = STEP * 8 // BITS if BITS < 8 else STEP * ((D + UNIT - 1) // UNIT)
    FOLDED: tl.constexpr = V_SCALE.dtype.element_ty.primitive_bitwidth == 16 and V_SHARED % UNIT == 0
    start, end = share_of(LENGTH, slots, length_row, length_head, row, head, split, splits, HAS_LENGTH, BLOCK)
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
