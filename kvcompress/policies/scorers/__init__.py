"""Scorers: which slots of a layer matter, higher = keep."""

from kvcompress.policies.scorers.attention import Attention

__all__ = ["Attention"]
