"""What a cache is put together from: the policies, the budget, presets, and the files that hold them."""

from kvcompress.config.budget import Budget
from kvcompress.config.compression import CompressionConfig

__all__ = ["Budget", "CompressionConfig"]
