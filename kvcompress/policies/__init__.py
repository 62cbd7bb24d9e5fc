"""The built-in policies, a folder a stage and a file a method; importing this module registers them all."""

from kvcompress.policies import allocators, evictors, mergers, quantizers, reducers, scorers

__all__ = ["allocators", "evictors", "mergers", "quantizers", "reducers", "scorers"]
