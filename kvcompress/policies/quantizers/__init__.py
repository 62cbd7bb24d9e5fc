"""Quantizers: how stored keys and values are packed into fewer bits."""

from kvcompress.policies.quantizers.fp8 import FP8
from kvcompress.policies.quantizers.k8v4 import K8V4
from kvcompress.policies.quantizers.quanto import Quanto
from kvcompress.policies.quantizers.rotated import Rotated

__all__ = ["FP8", "K8V4", "Quanto", "Rotated"]
