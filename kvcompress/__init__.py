"""Compress the key-value cache of LLaVA and LLaMA models with policies that plug together."""

from kvcompress.cache import CompressedCache, restore
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.config.budget import Budget
from kvcompress.errors import KVCompressError
from kvcompress.policies.registry import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS
from kvcompress.reuse import Chat, Document, compressing

__version__ = "0.1.0"

__all__ = [
    "ALLOCATORS",
    "EVICTORS",
    "MERGERS",
    "QUANTIZERS",
    "REDUCERS",
    "SCORERS",
    "Budget",
    "CacheReport",
    "Chat",
    "CompressedCache",
    "CompressionConfig",
    "Document",
    "KVCompressError",
    "compressing",
    "restore",
]
