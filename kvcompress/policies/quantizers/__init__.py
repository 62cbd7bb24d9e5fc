"""Quantizers: how stored keys and values are packed into fewer bits."""

from kvcompress.policies.quantizers.fp8 import FP8
from kvcompress.policies.quantizers.quanto import Quanto2, Quanto4, Quanto8

__all__ = ["FP8", "Quanto2", "Quanto4", "Quanto8"]
