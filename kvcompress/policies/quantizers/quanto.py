"""A few bits with optimum-quanto: keys per channel, values per token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvcompress.policies.quantizers.affine import Affine
from kvcompress.policies.registry import QUANTIZERS


@QUANTIZERS.register("quanto")
class Quanto(Affine):
    """Two, four or eight bits with optimum-quanto: keys per channel, values per token.

    Source: KIVI (arXiv 2402.02750, section 3); optimum-quanto (https://github.com/huggingface/optimum-quanto).

    *Deviates:* a group of tokens is quantized as a whole, once; scales are rounded outwards, so that no code clips.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
        bits: of each number; `quanto4` is short for `quanto` with bits=4.
    """

    code_dtype: ClassVar[torch.dtype | None] = torch.uint8

    bits: Literal[2, 4, 8] = 4

    @property
    def key_bits(self) -> int:
        """As chosen."""
        return self.bits
