"""Decoding that all quantizers share: a code times its scale, minus its shift."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.policies.context import Codes


def decode_affine(numbers: Tensor, codes: Codes) -> Tensor:
    """Turns codes back into keys or values.

    Args:
        numbers: the unpacked codes as `[batch, kv_heads, slots, dim]`, in the dtype of the scales.
        codes: what they were packed in, with their scales and shifts.

    Returns:
        `number * scale - shift` in the dtype of the scales, where each row of scales serves `slots / scale_rows`
        neighbouring slots, and each part of it `dim / parts` neighbouring dimensions.
    """
    batch, heads, slots, dim = numbers.shape
    rows, parts = codes.scale.shape[2:]
    blocks = numbers.reshape(batch, heads, rows, slots // rows, parts, dim // parts)
    scale = codes.scale.view(batch, heads, rows, 1, parts, 1)
    if codes.shift is None:
        return (blocks * scale).reshape(numbers.shape)
    shift = codes.shift.view(batch, heads, rows, 1, parts, 1)
    if parts == dim:
        return torch.addcmul(shift.neg(), blocks, scale).reshape(numbers.shape)
    return (blocks * scale).sub_(shift).reshape(numbers.shape)  # addcmul is slow where dimensions share a scale
