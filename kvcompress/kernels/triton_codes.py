"""Attention of one query over quantized slots and others, in Triton: one launch for shares of either, one to merge."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import launching, powers
from kvcompress.kernels.triton_coded import coded_share
from kvcompress.kernels.triton_decode import (
    dense_share,
    merge_splits,
    shape_of,
    splits_of,
    strides_of,
    strides_over_heads,
)

_LEAST_COLUMNS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4) else 16  # of a product in Triton
_DENSE_BLOCK = 16  # slots in full precision of a tile: few are there, and one warp may work at them alone


@triton.jit(do_not_specialize=["slots", "splits", "dense_slots", "dense_splits"])
@no_type_check
def codes_kernel(
    Q, K, K_SCALE, K_SHIFT, K_ROWS, V, V_SCALE, V_SHIFT, V_ROWS, LENGTH, START, OUT, LSE, scale, slots, q_row, q_head,
    k_row, k_head, k_slot, ks_row, ks_head, ks_slot, kr_row, kr_head, v_row, v_head, v_slot, vs_row, vs_head, vs_slot,
    vr_row, vr_head, length_row, length_head, splits, DENSE_K, DENSE_V, DENSE_LENGTH, DENSE_START, dense_slots, dk_row,
    dk_head, dk_slot, dv_row, dv_head, dv_slot, dense_length_row, dense_length_head, dense_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, PLACES: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr,
    K_HAS_ROWS: tl.constexpr, V_HAS_ROWS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    K_SHARED: tl.constexpr, V_SHARED: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_START: tl.constexpr,
    BLOCK: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_DENSE: tl.constexpr,
    HAS_DENSE_LENGTH: tl.constexpr, DENSE_BLOCK: tl.constexpr, DENSE_ROWS: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row (`HEADS` of them), one share of its coded slots or of its others.

    Those of the others come last: they are short, and all of the coded shares have begun by then.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if split < splits:
        coded_share(
            Q, K, K_SCALE, K_SHIFT, K_ROWS, V, V_SCALE, V_SHIFT, V_ROWS, LENGTH, START, OUT, LSE, scale, slots, q_row,
            q_head, k_row, k_head, k_slot, ks_row, ks_head, ks_slot, kr_row, kr_head, v_row, v_head, v_slot, vs_row,
            vs_head, vs_slot, vr_row, vr_head, length_row, length_head, pair, split, splits, HEADS, GROUP, GROUP_BLOCK,
            D, UNIT, STEP, PLACES, BITS, FLOAT8, HAS_SHIFT, K_HAS_ROWS, V_HAS_ROWS, K_SLOTS, V_SLOTS, K_SHARED,
            V_SHARED, HAS_LENGTH, HAS_START, BLOCK, BASE, PRECISION, ASSEMBLY,
        )  # fmt: skip
    elif HAS_DENSE:
        dense_share(
            Q, DENSE_K, DENSE_V, DENSE_LENGTH, DENSE_START, OUT, LSE, scale, dense_slots, q_row, q_head, dk_row,
            dk_head, dk_slot, dv_row, dv_head, dv_slot, dense_length_row, dense_length_head, pair, split - splits,
            dense_splits, split, HEADS, GROUP, DENSE_ROWS, D, DIMS, CHUNK, D, DIMS, HAS_DENSE_LENGTH, HAS_START,
            DENSE_BLOCK, PRECISION,
        )  # fmt: skip


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


def dense_tile(head_dim: int, group: int, itemsize: int) -> dict[str, int]:
    """How slots in full precision are read, by however many warps those with codes want."""
    dims = powers(head_dim)
    chunk = dims if itemsize == 2 else min(dims, 64)
    return {"DENSE_BLOCK": _DENSE_BLOCK, "DENSE_ROWS": powers(group), "DIMS": dims, "CHUNK": chunk}


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
    most = shape_of(keys, start, slots)[2]
    query, keys, values = launching(query.squeeze(2)), launching(keys), launching(values)
    device, group = keys.device, heads // kv_heads
    float8, bits = key_codes.dtype == torch.float8_e4m3fn, 8 // -(-head_dim // width)
    words, queries = words_of(head_dim, bits, float8, query.dtype), columns(group)
    tile, programs = blocks(head_dim, queries, bits, words["BASE"], query.dtype)
    of_codes = splits_of(batch * kv_heads, code_slots, tile["BLOCK"], device, programs)
    of_dense = splits_of(batch * kv_heads, most, _DENSE_BLOCK, device) if most else 0
    parts = torch.empty(of_codes + of_dense, batch * heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(of_codes + of_dense, batch * heads, dtype=torch.float32, device=device)
    read_as = torch.int16 if words["STEP"] == 2 else torch.uint8
    key_data, value_data = (launching(codes).view(read_as) for codes in (key_codes, value_codes))
    (key_scale, key_shift), (value_scale, value_shift) = _alike(key_scale, key_shift), _alike(value_scale, value_shift)
    codes_kernel[(batch * kv_heads, of_codes + of_dense)](
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
        *strides_of(key_data, code_start),
        *strides_of(key_scale, code_start),
        *strides_of(key_rows, code_start)[:2],
        *strides_of(value_data, code_start),
        *strides_of(value_scale, code_start),
        *strides_of(value_rows, code_start)[:2],
        *strides_over_heads(coded),
        of_codes,
        keys,
        values,
        lse if length is None else length,
        lse if start is None else start,
        most,
        *strides_of(keys, start),
        *strides_of(values, start),
        *strides_over_heads(length),
        of_dense,
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
        HAS_DENSE=of_dense > 0,
        HAS_DENSE_LENGTH=length is not None,
        **dense_tile(head_dim, group, query.element_size()),
        **tile,
    )
    out = torch.empty(batch, heads, 1, head_dim, dtype=query.dtype, device=device)
    merge_splits(parts, lse, out.view(batch * heads, -1))
    return out
