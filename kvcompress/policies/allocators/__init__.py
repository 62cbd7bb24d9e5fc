"""Allocators: how many slots each layer keeps."""

from kvcompress.policies.allocators.prefix import Prefix
from kvcompress.policies.allocators.uniform import Uniform

__all__ = ["Prefix", "Uniform"]
