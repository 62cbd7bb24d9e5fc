"""Compress the key-value cache of LLaVA and LLaMA models with policies that plug together."""

from kvcompress.budget import Budget
from kvcompress.cache import CompressedCache, restore
from kvcompress.config import CompressionConfig
from kvcompress.errors import KVCompressError
from kvcompress.registry import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS
from kvcompress.report import CacheReport

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
    "CompressedCache",
    "CompressionConfig",
    "KVCompressError",
    "restore",
]
