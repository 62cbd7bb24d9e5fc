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
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kvcompress.kernels.dense import attention_with_slots, in_one_dtype, merge_attention
from kvcompress.kernels.device import runs_triton

_WIDENED = {torch.bfloat16: (4, 2.0**120), torch.float16: (7, 2.0**8)}  # dtype -> places to shift, factor
_BLOCK = 4096  # slots decoded at a time without a kernel of our own


def decode_attention_codes(
    query: Float[Tensor, "batch heads one head_dim"],
    key_codes: Shaped[Tensor, "batch kv_heads coded_slots width"],
    key_scale: Float[Tensor, "batch kv_heads key_rows key_parts"],
    key_shift: Float[Tensor, "batch kv_heads key_rows key_parts"] | None,
    value_codes: Shaped[Tensor, "batch kv_heads coded_slots width"],
    value_scale: Float[Tensor, "batch kv_heads value_rows value_parts"],
    value_shift: Float[Tensor, "batch kv_heads value_rows value_parts"] | None,
    keys: Float[Tensor, "batch kv_heads slots head_dim"],
    values: Float[Tensor, "batch kv_heads slots head_dim"],
    scaling: float,
    coded: Int[Tensor, "batch sets"] | None,
    length: Int[Tensor, "batch other_sets"] | None,
    *,
    key_rows: Int[Tensor, "batch kv_heads coded_slots"] | None = None,
    value_rows: Int[Tensor, "batch kv_heads coded_slots"] | None = None,
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
        keys: buffer of keys in full precision, after rotary embedding; it may have no slots.
        values: buffer of values in full precision.
        scaling: factor on the logits.
        coded: coded slots in use, the first ones of each row (`sets` is 1) or of each row and key/value head; None if
            all are.
        length: slots of full precision in use, likewise.
        key_rows: the row of scales of each coded slot's key; None where that follows from the slots' order.
        value_rows: the same for values.

    Returns:
        The attention output in the dtype of `query` (under autocast, in autocast's); 0 where no slot is in use.
    """
    query, keys, values = in_one_dtype(query, keys, values)
    codes = (key_codes, key_scale, key_shift, value_codes, value_scale, value_shift)
    arguments = (*codes, keys, values, scaling, coded, length, key_rows, value_rows)
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
    for part in range(packed):
        shifted = codes >> part * bits if part else codes
        numbers[..., part, :] = shifted & 2**bits - 1 if part < last else shifted
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
) -> Tensor:
    codes = (key_codes, key_scale, key_shift, value_codes, value_scale, value_shift)
    arguments = (*codes, keys, values, scaling, coded, length, key_rows, value_rows)
    if not runs_triton(query.device):
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
        "Tensor? key_rows, Tensor? value_rows) -> Tensor"
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
) -> Tensor:
    """Decodes a block of slots at a time, and joins their attention with that over the slots in full precision."""
    (batch, heads, _, head_dim), (kv_heads, slots) = query.shape, key_codes.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    parts = None
    if keys.shape[2]:
        parts = attention_with_slots(grouped, keys, values, scaling, in_use(length, keys.shape[2], 0))
    groups = max(1, *(slots // scale.shape[2] for scale in (key_scale, value_scale)))
    step = max(1, _BLOCK // groups) * groups
    for start in range(0, slots, step):
        end = min(start + step, slots)
        block_keys = _block(key_codes, key_scale, key_shift, key_rows, start, end, head_dim)
        block_values = _block(value_codes, value_scale, value_shift, value_rows, start, end, head_dim)
        used = in_use(coded, end - start, start)
        part = attention_with_slots(grouped, block_keys.to(query.dtype), block_values.to(query.dtype), scaling, used)
        parts = part if parts is None else merge_attention(*parts, *part)
    assert parts is not None
    return parts[0].reshape(batch, heads, 1, head_dim)


def in_use(length: Tensor | None, slots: int, start: int) -> Tensor | None:
    """Which of some slots from `start` on are in use, `[batch, sets, slots]`."""
    if length is None:
        return None
    return torch.arange(start, start + slots, device=length.device) < length.unsqueeze(-1)


def _block(
    codes: Tensor, scale: Tensor, shift: Tensor | None, rows: Tensor | None, start: int, end: int, head_dim: int
) -> Tensor:
    """Keys or values of some coded slots, of which the first begins a group."""
    if rows is not None:
        index = rows[:, :, start:end].long().unsqueeze(-1).expand(-1, -1, -1, scale.shape[3])
        scale, shift = scale.gather(2, index), None if shift is None else shift.gather(2, index)
    else:
        group = codes.shape[2] // scale.shape[2]
        own = slice(start // group, end // group)
        scale, shift = scale[:, :, own], None if shift is None else shift[:, :, own]
    return decoded(codes[:, :, start:end], scale, shift, head_dim)
