"""Eight-bit floating point."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvcompress.kernels.codes import decoded
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.registry import QUANTIZERS

_DTYPE = torch.float8_e4m3fn


@QUANTIZERS.register("fp8")
class FP8(Quantizer):
    """Eight-bit floating point (four bits of exponent, three of mantissa) with a scale per head and block of tokens.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433, section 3).

    Every number is off by at most 1/16 of itself, or half the smallest step (scale / 1024) near zero.

    Args:
        group: tokens of a block.
        residual: most recent tokens that stay in full precision.
    """

    code_dtype: ClassVar[torch.dtype | None] = _DTYPE

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
        return decoded(codes.data.view(_DTYPE), codes.scale, codes.shift, codes.dim)
