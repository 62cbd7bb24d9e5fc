"""One compressed cache: its state, and the flow of data through a step."""

from kvcompress.cache.cache import CompressedCache, restore

__all__ = ["CompressedCache", "restore"]
