"""Affine codes of rotated keys and values, among whose channels no outlier is left."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from kvcompress.kernels.codes import decoded
from kvcompress.policies.context import Codes, Keys
from kvcompress.policies.quantizers.affine import Affine
from kvcompress.policies.registry import QUANTIZERS


class Turned(Affine):
    """Base of quantizers that encode the product of keys and values with a Hadamard matrix."""

    def turned(self, tensor: Tensor) -> Tensor:
        """Each slot times H, in float32, summed in float64: so a slot is what it would be alone, to the last bit.

        A product in float32 adds up in another order, by the number of slots, and a group's scales must not depend on
        what lies beside it.
        """
        return _times_hadamard(tensor.double()).float()

    def decode(self, codes: Codes) -> Keys:
        """Rescales in float32 and turns back."""
        shift = None if codes.shift is None else codes.shift.float()
        return _times_hadamard(decoded(codes.data, codes.scale.float(), shift, codes.dim)).to(codes.scale.dtype)


@QUANTIZERS.register("rotated")
class Rotated(Turned):
    """Two or four bits after a Hadamard rotation of each head: keys per channel, values per token.

    Source: QuaRot (arXiv 2404.00456, section 4: rotated keys and values); KIVI (arXiv 2402.02750) for the groups.

    A key or value x is stored as the affine codes of x H, where H is the Walsh-Hadamard matrix over the head's
    dimensions, divided by the root of their number: symmetric and its own inverse. So every number of x H is off by at
    most half a step of its group, and x by as much in length. Where the dimensions are no power of two, H is made of
    blocks of the largest power of two that divides them.

    *Deviates:* QuaRot fuses the rotation of values into the weights and turns queries instead of keys; here codes are
    turned back as they are read, so that weights stay what they are. Its groups are of a token; here keys have theirs
    over tokens.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
        bits: of each number; `rotated4` is short for `rotated` with bits=4.
    """

    bits: Literal[2, 4] = 4

    @property
    def key_bits(self) -> int:
        """As chosen."""
        return self.bits


def _times_hadamard(tensor: Tensor) -> Tensor:
    """Each slot times H, in the dtype given."""
    dim = tensor.shape[-1]
    size = dim & -dim
    blocks = tensor.reshape(*tensor.shape[:-1], dim // size, size)
    return (blocks @ _hadamard(size, tensor.device, tensor.dtype)).reshape(tensor.shape).mul_(size**-0.5)


@functools.cache
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The Walsh-Hadamard matrix of ones and minus ones, `[size, size]`."""
    with torch.inference_mode(False):
        number = torch.arange(size, device=device)
        both, parity = number & number[:, None], torch.zeros(size, size, dtype=torch.long, device=device)
        for bit in range(size.bit_length()):
            parity ^= both >> bit & 1
        return (1 - 2 * parity).to(dtype)
