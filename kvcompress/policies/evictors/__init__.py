"""Evictors: which slots of a layer stay."""

from kvcompress.policies.evictors.chunk import Chunk
from kvcompress.policies.evictors.critical import Critical
from kvcompress.policies.evictors.every import Every
from kvcompress.policies.evictors.streaming import Streaming
from kvcompress.policies.evictors.topk import TopK

__all__ = ["Chunk", "Critical", "Every", "Streaming", "TopK"]
