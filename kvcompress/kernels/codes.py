"""Attention of one query per row over quantized slots and, after them, slots in full precision.

Layout of codes, which are bytes `[batch, kv_heads, slots, width]`:

- 8 bits: a byte is the number of one dimension (`width == head_dim`); as uint8 from 0 to 255, or as float8_e4m3fn.
- 4 bits: `width` is half of `head_dim`, rounded up. The lower four bits of byte j are dimension j, the upper four
  dimension `width + j`. So a kernel that reads a run of bytes has two runs of neighbouring dimensions.
- 2 bits: `width` is a quarter. Bits 2i and 2i + 1 of byte j are dimension `i * width + j`.

A number is `code * scale - shift`; scales and shifts are `[batch, kv_heads, scale_rows, parts]` in the dtype of keys
and values, with the same strides. A row of scales serves `slots / scale_rows` neighbouring slots, unless `rows` gives
each slot's row; a part of it `head_dim / parts` neighbouring dimensions. A group of tokens with a scale per channel has
`parts == head_dim`, a scale per token `scale_rows == slots`. Buffers may have more slots than are in use.

Where rows and heads have different numbers of slots, theirs lie one after the other as those of one row and head, in a
layout that says where each begins; without `rows` each begins a row of scales.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kvcompress.kernels.dense import attention_with_slots
from kvcompress.kernels.device import takes_triton
from kvcompress.kernels.precision import in_one_dtype
from kvcompress.kernels.ragged import padded
from kvcompress.kernels.softmax import merge_attention

_WIDENED = {torch.bfloat16: (4, 2.0**120), torch.float16: (7, 2.0**8)}  # dtype -> places to shift, factor
_BLOCK = 4096  # slots decoded at a time without a kernel of our own


def decode_attention_codes(
    query: Float[Tensor, "batch heads one head_dim"],
    key_codes: Shaped[Tensor, "code_batch code_heads coded_slots width"],
    key_scale: Float[Tensor, "code_batch code_heads key_rows key_parts"],
    key_shift: Float[Tensor, "code_batch code_heads key_rows key_parts"] | None,
    value_codes: Shaped[Tensor, "code_batch code_heads coded_slots width"],
    value_scale: Float[Tensor, "code_batch code_heads value_rows value_parts"],
    value_shift: Float[Tensor, "code_batch code_heads value_rows value_parts"] | None,
    keys: Float[Tensor, "*buffer head_dim"],
    values: Float[Tensor, "*buffer head_dim"],
    scaling: float,
    coded: Int[Tensor, "batch sets"] | None,
    length: Int[Tensor, "batch other_sets"] | None,
    *,
    key_rows: Int[Tensor, "code_batch code_heads coded_slots"] | None = None,
    value_rows: Int[Tensor, "code_batch code_heads coded_slots"] | None = None,
    code_start: Int[Tensor, "batch kv_heads"] | None = None,
    code_slots: int = 0,
    start: Int[Tensor, "batch kv_heads"] | None = None,
    slots: int = 0,
) -> Float[Tensor, "batch heads one head_dim"]:
    """Attention of one query per row over coded slots and slots in full precision, as one softmax.

    On CUDA, a Triton kernel reads the codes of slots in use and decodes them in registers; elsewhere, blocks of slots
    are decoded and joined. The layout of codes is described on top of this module. The device is asked nothing.

    Args:
        query: one query per row, after rotary embedding.
        key_codes: codes of keys, uint8 or float8_e4m3fn.
        key_scale: steps between neighbouring codes.
        key_shift: what is subtracted; None if zero is code 0; both of keys and values or neither.
        value_codes: codes of values, of as many bits.
        value_scale: as for keys.
        value_shift: as for keys.
        keys: buffer of keys in full precision, after rotary embedding, `[batch, kv_heads, slots, head_dim]`, which may
            have no slots. With `start`, the slots of all rows and heads one after the other, `[all slots, head_dim]`.
        values: buffer of values in full precision, likewise.
        scaling: factor on the logits.
        coded: coded slots in use, the first ones of each row (`sets` is 1) or of each row and key/value head; None if
            all are.
        length: slots of full precision in use, likewise.
        key_rows: the row of scales of each coded slot's key; None where that follows from the slots' order.
        value_rows: the same for values.
        code_start: where the coded slots of each row and key/value head begin in buffers without gaps; then `start` has
            to be given too.
        code_slots: with `code_start`, coded slots of the row and head that has most.
        start: the same of slots in full precision.
        slots: the same of slots in full precision.

    Returns:
        The attention output in the dtype of `query` (under autocast, in autocast's); 0 where no slot is in use.
    """
    query, keys, values = in_one_dtype(query, keys, values)
    codes = (key_codes, key_scale, key_shift, value_codes, value_scale, value_shift)
    layout = (code_start, code_slots, start, slots)
    arguments = (*codes, keys, values, scaling, coded, length, key_rows, value_rows, *layout)
    if query.device.type != "cuda":
        return _in_torch(query, *arguments)
    if torch.compiler.is_compiling():
        return codes_op(query, *arguments)  # type: ignore[no-any-return]
    return _on_cuda(query, *arguments)


def decoded(
    codes: Shaped[Tensor, "batch kv_heads slots width"],
    scale: Float[Tensor, "batch kv_heads scale_rows parts"],
    shift: Float[Tensor, "batch kv_heads scale_rows parts"] | None,
    head_dim: int,
) -> Float[Tensor, "batch kv_heads slots head_dim"]:
    """Keys or values in the dtype of the scales, from codes whose rows of scales follow from the slots' order.

    Args:
        codes: codes in the layout described on top of this module.
        scale: steps between neighbouring codes.
        shift: what is subtracted; None for nothing.
        head_dim: dimensions of a slot.
    """
    batch, heads, slots = codes.shape[:3]
    rows, parts = scale.shape[2:]
    numbers = _unpacked(codes, head_dim, scale.dtype)
    blocks = numbers.reshape(batch, heads, rows, slots // rows, parts, head_dim // parts)
    scale = scale.reshape(batch, heads, rows, 1, parts, 1)
    if shift is None:
        return (blocks * scale).reshape(numbers.shape)
    shift = shift.reshape(batch, heads, rows, 1, parts, 1)
    if parts == head_dim:
        return torch.addcmul(shift.neg(), blocks, scale).reshape(numbers.shape)
    return (blocks * scale).sub_(shift).reshape(numbers.shape)  # addcmul is slow where dimensions share a scale


def _unpacked(codes: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Codes as numbers, `[batch, kv_heads, slots, head_dim]`."""
    packed = -(-head_dim // codes.shape[3])
    if codes.dtype == torch.float8_e4m3fn:
        return _from_float8(codes, dtype)
    bits, last = 8 // packed, packed - 1
    numbers = torch.empty(*codes.shape[:3], packed, codes.shape[3], dtype=dtype, device=codes.device)
    bare = torch.empty_like(codes) if last else codes  # one place for all parts: new memory costs a CPU more than bits
    for part in range(packed):
        if part:
            torch.bitwise_right_shift(codes, part * bits, out=bare)
        if part < last:
            torch.bitwise_and(bare if part else codes, 2**bits - 1, out=bare)
        numbers[..., part, :] = bare
    return numbers.flatten(3)[..., :head_dim]


def _from_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Eight-bit floats in a wider dtype; much faster than torch's own conversion on a CPU.

    Sign, exponent and mantissa are moved to their place among 16 bits; a factor makes up for the other exponent bias.
    """
    if dtype not in _WIDENED:
        return codes.to(dtype)
    places, factor = _WIDENED[dtype]
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(places).bitwise_and_((0x7F << places) - 0x8000)
    return bits.view(dtype).mul_(factor)


def _on_cuda(
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
    codes = (key_codes, key_scale, key_shift, value_codes, value_scale, value_shift)
    layout = (code_start, code_slots, start, slots)
    arguments = (*codes, keys, values, scaling, coded, length, key_rows, value_rows, *layout)
    if not takes_triton(query):
        return _in_torch(query, *arguments).contiguous()
    from kvcompress.kernels.triton_codes import decode_codes

    return decode_codes(query, *arguments)


codes_op = torch.library.custom_op(
    "kvcompress::decode_attention_codes",
    _on_cuda,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key_codes, Tensor key_scale, Tensor? key_shift, Tensor value_codes, Tensor value_scale, "
        "Tensor? value_shift, Tensor keys, Tensor values, float scaling, Tensor? coded, Tensor? length, "
        "Tensor? key_rows, Tensor? value_rows, Tensor? code_start=None, int code_slots=0, Tensor? start=None, "
        "int slots=0) -> Tensor"
    ),
)


@codes_op.register_fake
def _shape(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def _in_torch(
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
    """Decodes a block of slots at a time, and joins their attention with that over the slots in full precision."""
    if start is not None:
        keys, values = padded(keys, start, slots), padded(values, start, slots)
    (batch, heads, _, head_dim), (kv_heads, all_slots) = query.shape, key_codes.shape[1:3]
    kv_heads = kv_heads if code_start is None else code_start.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    parts = None
    if keys.shape[2]:
        parts = attention_with_slots(grouped, keys, values, scaling, in_use(length, keys.shape[2], 0))
    groups = max(1, *(all_slots // scale.shape[2] for scale in (key_scale, value_scale)))
    step, most = max(1, _BLOCK // groups) * groups, all_slots if code_start is None else code_slots
    for first in range(0, most, step):
        end = min(first + step, most)
        block_keys = _block(key_codes, key_scale, key_shift, key_rows, first, end, head_dim, code_start)
        block_values = _block(value_codes, value_scale, value_shift, value_rows, first, end, head_dim, code_start)
        used = in_use(coded, end - first, first)
        part = attention_with_slots(grouped, block_keys, block_values, scaling, used)
        parts = part if parts is None else merge_attention(*parts, *part)
    assert parts is not None
    return parts[0].reshape(batch, heads, 1, head_dim)


def in_use(length: Tensor | None, slots: int, start: int) -> Tensor | None:
    """Which of some slots from `start` on are in use, `[batch, sets, slots]`."""
    if length is None:
        return None
    return torch.arange(start, start + slots, device=length.device) < length.unsqueeze(-1)


def part_of(
    codes: Tensor, scale: Tensor, shift: Tensor | None, rows: Tensor | None, begin: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and shifts of some slots of every row and head, out of buffers without gaps.

    Args:
        codes: codes of all rows and heads, `[1, 1, all slots, width]`.
        scale: scales, `[1, 1, scale_rows, parts]`.
        shift: shifts, likewise.
        rows: each slot's row of scales, `[1, 1, all slots]`; None where that follows from the slots' order.
        begin: where the slots of each row and head begin, `[batch, kv_heads]`.
        start: the first slot that is wanted of each, which begins a group.
        end: the slot after the last; where a head has fewer, any others are in their place.
    """
    unit = codes.shape[2] // scale.shape[2] if rows is None else 1
    units = torch.arange(start // unit, end // unit, device=begin.device)
    at = ((begin // unit).unsqueeze(-1) + units).clamp(max=codes.shape[2] // unit - 1)
    data = codes.view(torch.uint8).view(-1, unit, codes.shape[3])[at].flatten(2, 3).view(codes.dtype)
    at = at if rows is None else rows[0, 0][at].long()
    return data, scale[0, 0][at], None if shift is None else shift[0, 0][at]


def _block(
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    rows: Tensor | None,
    start: int,
    end: int,
    head_dim: int,
    begin: Tensor | None,
) -> Tensor:
    """Keys or values of some coded slots, of which the first begins a group."""
    if begin is not None:
        return decoded(*part_of(codes, scale, shift, rows, begin, start, end), head_dim)
    if rows is not None:
        index = rows[:, :, start:end].long().unsqueeze(-1).expand(-1, -1, -1, scale.shape[3])
        scale, shift = scale.gather(2, index), None if shift is None else shift.gather(2, index)
    else:
        group = codes.shape[2] // scale.shape[2]
        own = slice(start // group, end // group)
        scale, shift = scale[:, :, own], None if shift is None else shift[:, :, own]
    return decoded(codes[:, :, start:end], scale, shift, head_dim)
