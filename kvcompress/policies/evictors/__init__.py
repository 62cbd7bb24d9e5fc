"""Evictors: which slots of a layer stay."""

from kvcompress.policies.evictors.chunk import Chunk
from kvcompress.policies.evictors.critical import Critical
from kvcompress.policies.evictors.streaming import Streaming
from kvcompress.policies.evictors.topk import TopK

__all__ = ["Chunk", "Critical", "Streaming", "TopK"]
