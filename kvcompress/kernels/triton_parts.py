"""What one part of the dimensions of coded slots adds to logits and to weighted sums, in Triton.

Codes are read as words of `STEP` bytes, one or two. Part n of a slot's dimensions are `n // STEP * UNIT + n % STEP +
STEP * place`. Of codes of two or four bits a word holds a number of each part, in byte `n % STEP` from bit `n // STEP *
BITS` on, and `UNIT` is the bytes of a slot; of codes of eight bits there are words of their own for every `UNIT` bytes.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _numbers(words, MOVE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr):
    """The codes that start `MOVE` bits up each word, as float32."""
    bits = words.to(tl.int32) >> MOVE
    if FLOAT8:  # sign, exponent and mantissa at their place in float32, and a factor for the other bias
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36
    code = bits & ((1 << BITS) - 1)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # cheaper than converting


@triton.jit
@no_type_check
def _raised(
    words, MOVE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, BASE: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The same, or four bits of them, `BASE` more than they are, in a dtype that holds them exactly.

    Half precision has room for four bits in the mantissa of `BASE`, so that nothing has to be converted. `ASSEMBLY`
    takes two words of 16 bits, which lie side by side in a register, at once.
    """
    if BASE == 0:
        return _numbers(words, MOVE, BITS, FLOAT8).to(DTYPE)
    else:
        ONE: tl.constexpr = 0x4300 if BASE == 128 else 0x6400  # the bits of `BASE`
        if ASSEMBLY:
            one, move = tl.full(words.shape, ONE, tl.int16), tl.full(words.shape, MOVE, tl.int16)
            bits = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $3, 31; shr.b32 t, $1, t; lop3.b32 $0, t, 0x000F000F, $2, 0xEA; }",
                "=r,r,r,r", [words, one, move], dtype=tl.int16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            bits = ((words.to(tl.int16) >> MOVE) & (15 if BITS >= 4 else 3)) | ONE
        return bits.to(DTYPE, bitcast=True)


@triton.jit
@no_type_check
def _times(
    words, factor, summed, MOVE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, BASE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Adds the product of raised codes and a factor; of eight bits, of either half: 17 times `BASE` too much."""
    summed = tl.dot(_raised(words, MOVE, BITS, FLOAT8, BASE, factor.dtype, ASSEMBLY), factor, summed)
    if BITS == 8 and BASE:
        upper = _raised(words, MOVE + 4, BITS, FLOAT8, BASE, factor.dtype, ASSEMBLY)
        summed = tl.dot(upper, factor * 16, summed)
    return summed


@triton.jit
@no_type_check
def _decoded(
    words, SCALE, SHIFT, at, MOVE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr
):  # fmt: skip
    """Keys or values, of which each number has a scale and a shift of its own."""
    number = _numbers(words, MOVE, BITS, FLOAT8) * tl.load(SCALE + at).to(tl.float32)
    if HAS_SHIFT:
        number -= tl.load(SHIFT + at).to(tl.float32)
    return number.to(SCALE.dtype.element_ty)


@triton.jit
@no_type_check
def _column(tile, NUMBER: tl.constexpr):
    """A column of a tile that was read as a whole, for the sake of wide reads."""
    column = tl.arange(0, tile.shape[1])[None, :]
    return tl.sum(tl.where(column == NUMBER, tile.to(tl.float32), 0.0), 1)


@triton.jit
@no_type_check
def _each(FIRST, place, PART: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr):
    """One number for each dimension of a part, of which there are at most `MOST`; a pair of parts is read at once."""
    if STEP == 1:
        return tl.load(FIRST + tl.minimum(place, MOST - 1))
    else:
        pair = tl.load(FIRST.to(tl.pointer_type(tl.int32), bitcast=True) + place)
        return (pair >> 16 * (PART % STEP)).to(tl.int16).to(FIRST.dtype.element_ty, bitcast=True)


@triton.jit
@no_type_check
def logits_of_part(
    logits, offset, q, words, SCALE, SHIFT, row, row_stride, place, PART: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr,
    HAS_SHIFT: tl.constexpr, BASE: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Adds the products of queries and the keys of one part of the dimensions; what they are too large by, to `offset`.

    A scale that all slots of the tile share for a dimension goes into the query, one that the dimensions of a slot
    share into the products: then the codes are multiplied as they are. In float32 registers have no room for that.
    """
    MOVE: tl.constexpr = 8 * (PART % STEP) + (BITS * (PART // STEP) if BITS < 8 else 0)
    FIRST: tl.constexpr = PART % STEP + PART // STEP * UNIT
    HALF: tl.constexpr = q.dtype.primitive_bitwidth == 16
    RAISED: tl.constexpr = BASE * (17 if BITS == 8 else 1)
    if HALF and ONE_ROW and SHARED == 1:
        at = row * row_stride + PART // STEP * UNIT
        scaled = q * _each(SCALE + at, place, PART, STEP, D - PART // STEP * UNIT)[:, None]
        if BASE:
            offset = tl.dot(tl.full([16, words.shape[1]], RAISED, q.dtype), scaled, offset)
        if HAS_SHIFT:
            shifted = q * _each(SHIFT + at, place, PART, STEP, D - PART // STEP * UNIT)[:, None]
            offset = tl.dot(tl.full([16, words.shape[1]], 1, q.dtype), shifted, offset)
        logits = _times(words, scaled, logits, MOVE, BITS, FLOAT8, BASE, ASSEMBLY)
    elif HALF and SHARED % UNIT == 0:
        at, total = row * row_stride + FIRST // SHARED, tl.sum(q.to(tl.float32), 0)[None, :]
        products = _times(words, q, tl.zeros_like(logits), MOVE, BITS, FLOAT8, BASE, ASSEMBLY) - total * RAISED
        logits += products * tl.load(SCALE + at).to(tl.float32)
        if HAS_SHIFT:
            logits -= total * tl.load(SHIFT + at).to(tl.float32)
    else:
        at = row * row_stride + (FIRST + STEP * place[None, :]) // SHARED
        k = _decoded(words, SCALE, SHIFT, at, MOVE, BITS, FLOAT8, HAS_SHIFT)
        logits = tl.dot(k.to(q.dtype), q, logits, input_precision=PRECISION)
    return logits, offset


@triton.jit
@no_type_check
def weighted_of_part(
    summed, p, words, SCALE, SHIFT, scales, row, row_stride, place, PART: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, SHARED: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BASE: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Adds the values of one part of the dimensions, weighted; `FOLDED` scales of whole slots go into the weights."""
    MOVE: tl.constexpr = 8 * (PART % STEP) + (BITS * (PART // STEP) if BITS < 8 else 0)
    FIRST: tl.constexpr = PART % STEP + PART // STEP * UNIT
    DTYPE: tl.constexpr = SCALE.dtype.element_ty
    if FOLDED:
        scaled = (p * _column(scales, FIRST // SHARED)[:, None]).to(DTYPE)
        return _times(words, scaled, summed, MOVE, BITS, FLOAT8, BASE, ASSEMBLY)
    else:
        at = row[None, :] * row_stride + (FIRST + STEP * place[:, None]) // SHARED
        v = _decoded(words, SCALE, SHIFT, at, MOVE, BITS, FLOAT8, HAS_SHIFT)
        return tl.dot(v, p.to(DTYPE), summed, input_precision=PRECISION)


@triton.jit
@no_type_check
def excess_of_part(
    excess, p, scales, shifts, COLUMN: tl.constexpr, BITS: tl.constexpr, HAS_SHIFT: tl.constexpr, BASE: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """Adds what weighted sums with `FOLDED` scales are too large by, to each of 16 rows."""
    if FOLDED and BASE:
        scaled = (p * _column(scales, COLUMN)[:, None]).to(scales.dtype)
        raised = tl.full([16, p.shape[0]], BASE * (17 if BITS == 8 else 1), scales.dtype)
        excess = tl.dot(raised, scaled, excess)
    if FOLDED and HAS_SHIFT:
        excess += tl.sum(p * _column(shifts, COLUMN)[:, None], 0)[None, :]
    return excess
