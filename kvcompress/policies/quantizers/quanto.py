"""Two, four and eight bits with optimum-quanto: keys per channel, values per token."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.kernels.codes import decoded
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.registry import QUANTIZERS


class Quanto(Quantizer):
    """Affine codes of a few bits; scales and shifts in the dtype of the keys, rounded outwards so that nothing clips.

    Every number is off by at most half a step, which is (largest - smallest) / (2^bits - 1) of its group.
    """

    bits: ClassVar[int]
    code_dtype: ClassVar[torch.dtype | None] = torch.uint8

    def encode_keys(self, keys: Keys) -> Codes:
        """One scale per channel and group of tokens."""
        batch, heads, tokens, dim = keys.shape
        grouped = keys.view(batch, heads, tokens // self.group, self.group, dim)
        return self._encode(grouped, axis=3, shape=keys.shape)

    def encode_values(self, values: Values) -> Codes:
        """One scale per token and run of at most `group` channels."""
        batch, heads, tokens, dim = values.shape
        parts = dim // math.gcd(dim, self.group)
        return self._encode(values.view(batch, heads, tokens, parts, dim // parts), axis=4, shape=values.shape)

    def decode(self, codes: Codes) -> Keys:
        """Unpacks and rescales."""
        return decoded(codes.data, codes.scale, codes.shift, codes.dim)

    def _encode(self, grouped: Tensor, axis: int, shape: torch.Size) -> Codes:
        from optimum.quanto.library import quantize  # noqa: F401  (registers its operators with torch)
        from optimum.quanto.tensor.packed import pack_weights

        most = 2**self.bits - 1
        low, high = grouped.amin(axis, keepdim=True).float(), grouped.amax(axis, keepdim=True).float()
        shift = _rounded_up(-low, grouped.dtype)
        scale = _rounded_up(((high + shift.float()) / most).clamp(min=torch.finfo(grouped.dtype).tiny), grouped.dtype)
        numbers = torch.ops.quanto.quantize_affine(
            grouped.float(), bits=self.bits, axis=0, group_size=None, scale=scale.float(), shift=shift.float()
        ).view(shape)
        if self.bits < 8:
            numbers = pack_weights(numbers.movedim(-1, 0), self.bits).movedim(0, -1).contiguous()
        rows = (*shape[:2], grouped.shape[2], -1)
        return Codes(numbers, scale.reshape(rows), shift.reshape(rows), shape[3])


@QUANTIZERS.register("quanto2")
class Quanto2(Quanto):
    """Two bits with optimum-quanto: keys per channel, values per token.

    Source: KIVI (arXiv 2402.02750, section 3); optimum-quanto (https://github.com/huggingface/optimum-quanto).

    *Deviates:* a group of tokens is quantized as a whole, once; scales are rounded outwards, so that no code clips.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
    """

    bits: ClassVar[int] = 2


@QUANTIZERS.register("quanto4")
class Quanto4(Quanto):
    """Four bits with optimum-quanto: keys per channel, values per token.

    Source: KIVI (arXiv 2402.02750, section 3); optimum-quanto (https://github.com/huggingface/optimum-quanto).

    *Deviates:* a group of tokens is quantized as a whole, once; scales are rounded outwards, so that no code clips.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
    """

    bits: ClassVar[int] = 4


@QUANTIZERS.register("quanto8")
class Quanto8(Quanto):
    """Eight bits with optimum-quanto: keys per channel, values per token.

    Source: KIVI (arXiv 2402.02750, section 3); optimum-quanto (https://github.com/huggingface/optimum-quanto).

    *Deviates:* a group of tokens is quantized as a whole, once; scales are rounded outwards, so that no code clips.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
    """

    bits: ClassVar[int] = 8


def _rounded_up(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a dtype that is not smaller."""
    narrow = wide.to(dtype)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    return torch.where(narrow.float() < wide, above, narrow)
