"""One token of every row written into a slot of its buffers, keys and values at once, in Triton."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.device import launching, powers
from kvcompress.kernels.triton_decode import strides_over_heads


@triton.jit(do_not_specialize=["slots"])
@no_type_check
def write_kernel(
    K, V, NEW_K, NEW_V, SLOT, START, k_row, k_head, k_slot, v_row, v_head, v_slot, new_k_row, new_k_head, new_v_row,
    new_v_head, slot_row, slot_head, slots,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, VALUE_D: tl.constexpr, VALUE_DIMS: tl.constexpr,
    HAS_START: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row (`HEADS` of them). Nothing is written beyond `slots`."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // HEADS, pair % HEADS
    slot = tl.load(SLOT + row * slot_row + head * slot_head).to(tl.int64)
    if HAS_START:  # buffers without gaps
        slot += tl.load(START + pair).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    dim, value_dim = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
    key = tl.load(NEW_K + row * new_k_row + head * new_k_head + dim, mask=dim < D)
    value = tl.load(NEW_V + row * new_v_row + head * new_v_head + value_dim, mask=value_dim < VALUE_D)
    tl.store(K + row * k_row + head * k_head + slot * k_slot + dim, key, mask=there & (dim < D))
    tl.store(V + row * v_row + head * v_head + slot * v_slot + value_dim, value, mask=there & (value_dim < VALUE_D))


def write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor, start: Tensor | None) -> None:
    """As `write_slots`; the buffers' last axis has to be contiguous."""
    (batch, kv_heads, _, head_dim), value_dim = key.shape, value.shape[3]
    key, value = launching(key), launching(value)
    write_kernel[(batch * kv_heads,)](
        keys,
        values,
        key,
        value,
        slot,
        slot if start is None else start,
        *(keys.stride()[:3] if start is None else (0, 0, keys.stride(0))),
        *(values.stride()[:3] if start is None else (0, 0, values.stride(0))),
        *key.stride()[:2],
        *value.stride()[:2],
        *strides_over_heads(slot),
        keys.shape[-2],
        HEADS=kv_heads,
        D=head_dim,
        DIMS=powers(head_dim),
        VALUE_D=value_dim,
        VALUE_DIMS=powers(value_dim),
        HAS_START=start is not None,
        num_warps=1,
    )
