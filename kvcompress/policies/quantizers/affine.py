"""Affine codes of a few bits, keys per channel and values per token: what several quantizers share."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from kvcompress.kernels.codes import decoded
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values


class Affine(Quantizer):
    """Affine codes of a few bits; scales and shifts in the dtype of the keys, rounded outwards so that nothing clips.

    Every number is off by at most half a step, which is (largest - smallest) / (2^bits - 1) of its group.
    """

    @property
    @abstractmethod
    def key_bits(self) -> int:
        """Bits of a number of a key."""

    @property
    def value_bits(self) -> int:
        """Bits of a number of a value."""
        return self.key_bits

    def turned(self, tensor: Tensor) -> Tensor:
        """What is encoded of keys or values: themselves, or their product with a matrix that is its own inverse."""
        return tensor

    def encode_keys(self, keys: Keys) -> Codes:
        """One scale per channel and group of tokens."""
        batch, heads, tokens, dim = keys.shape
        grouped = self.turned(keys).view(batch, heads, tokens // self.group, self.group, dim)
        return _encoded(grouped, self.key_bits, 3, keys)

    def encode_values(self, values: Values) -> Codes:
        """One scale per token and run of at most `group` channels."""
        batch, heads, tokens, dim = values.shape
        parts = dim // math.gcd(dim, self.group)
        grouped = self.turned(values).view(batch, heads, tokens, parts, dim // parts)
        return _encoded(grouped, self.value_bits, 4, values)

    def decode(self, codes: Codes) -> Keys:
        """Unpacks and rescales."""
        return decoded(codes.data, codes.scale, codes.shift, codes.dim)


def _encoded(grouped: Tensor, bits: int, axis: int, given: Tensor) -> Codes:
    """Codes of groups of numbers along an axis, with scales and shifts in the dtype of what was given."""
    from optimum.quanto.library import quantize  # noqa: F401  (registers its operators with torch)
    from optimum.quanto.tensor.packed import pack_weights

    most = 2**bits - 1
    low, high = grouped.amin(axis, keepdim=True).float(), grouped.amax(axis, keepdim=True).float()
    shift = _rounded_up(-low, given.dtype)
    scale = _rounded_up(((high + shift.float()) / most).clamp(min=torch.finfo(given.dtype).tiny), given.dtype)
    numbers = torch.ops.quanto.quantize_affine(
        grouped.float(), bits=bits, axis=0, group_size=None, scale=scale.float(), shift=shift.float()
    ).view(given.shape)
    if bits < 8:
        numbers = pack_weights(numbers.movedim(-1, 0), bits).movedim(0, -1).contiguous()
    rows = (*given.shape[:2], grouped.shape[2], -1)
    return Codes(numbers, scale.reshape(rows), shift.reshape(rows), given.shape[3])


def _rounded_up(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a dtype that is not smaller."""
    narrow = wide.to(dtype)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    return torch.where(narrow.float() < wide, above, narrow)
