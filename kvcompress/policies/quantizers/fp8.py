"""Eight-bit floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.quantizers.affine import decode_affine
from kvcompress.policies.registry import QUANTIZERS

_DTYPE = torch.float8_e4m3fn
_WIDENED = {torch.bfloat16: (4, 2.0**120), torch.float16: (7, 2.0**8)}  # dtype -> places to shift, factor


@QUANTIZERS.register("fp8")
class FP8(Quantizer):
    """Eight-bit floating point (four bits of exponent, three of mantissa) with a scale per head and block of tokens.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433, section 3).

    Every number is off by at most 1/16 of itself, or half the smallest step (scale / 1024) near zero.

    Args:
        group: tokens of a block.
        residual: most recent tokens that stay in full precision.
    """

    def encode_keys(self, keys: Keys) -> Codes:
        """Scales the largest magnitude of a block to the largest code."""
        batch, heads, tokens, dim = keys.shape
        blocks = keys.view(batch, heads, tokens // self.group, -1)
        largest = blocks.abs().amax(-1, keepdim=True).float()
        scale = (largest / torch.finfo(_DTYPE).max).clamp(min=torch.finfo(keys.dtype).tiny).to(keys.dtype)
        most = torch.finfo(_DTYPE).max
        numbers = (blocks.float() / scale.float()).clamp(-most, most).to(_DTYPE)
        return Codes(numbers.view(keys.shape).view(torch.uint8), scale, None, dim)

    def encode_values(self, values: Values) -> Codes:
        """As keys."""
        return self.encode_keys(values)

    def decode(self, codes: Codes) -> Keys:
        """Rescales."""
        return decode_affine(_numbers(codes.data, codes.scale.dtype), codes)


def _numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of eight-bit floats in a wider dtype; much faster than torch's own conversion on CPU.

    Sign, exponent and mantissa are moved to their place among 16 bits; a factor makes up for the other exponent bias.
    """
    if dtype not in _WIDENED:
        return data.view(_DTYPE).to(dtype)
    places, factor = _WIDENED[dtype]
    bits = data.view(torch.int8).to(torch.int16).bitwise_left_shift_(places).bitwise_and_((0x7F << places) - 0x8000)
    return bits.view(dtype).mul_(factor)
