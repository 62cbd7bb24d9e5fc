"""Compress the key-value cache of LLaVA and LLaMA models with policies that plug together.

What is listed in `__all__` is imported when it is first used, so that `kvcompress --version` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvcompress.cache import CompressedCache, restore
    from kvcompress.cache.report import CacheReport
    from kvcompress.config import CompressionConfig
    from kvcompress.config.budget import Budget
    from kvcompress.errors import KVCompressError
    from kvcompress.policies.registry import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS
    from kvcompress.reuse import Chat, Document, compressing

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

_HOMES = {
    "kvcompress.cache": ("CompressedCache", "restore"),
    "kvcompress.cache.report": ("CacheReport",),
    "kvcompress.config": ("CompressionConfig",),
    "kvcompress.config.budget": ("Budget",),
    "kvcompress.errors": ("KVCompressError",),
    "kvcompress.policies.registry": ("ALLOCATORS", "EVICTORS", "MERGERS", "QUANTIZERS", "REDUCERS", "SCORERS"),
    "kvcompress.reuse": ("Chat", "Document", "compressing"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_PARTS = (
    "cache",
    "config",
    "errors",
    "evaluation",
    "files",
    "integrations",
    "kernels",
    "parallel",
    "policies",
    "progress",
    "reuse",
    "testing",
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    if name in _PARTS:
        return importlib.import_module(f"kvcompress.{name}")
    raise AttributeError(f"module 'kvcompress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
