"""Scorers: which slots of a layer matter, higher = keep."""

from kvcompress.policies.scorers.attention import Attention
from kvcompress.policies.scorers.defensive import Defensive
from kvcompress.policies.scorers.expected_attention import ExpectedAttention
from kvcompress.policies.scorers.key_diff import KeyDiff
from kvcompress.policies.scorers.key_norm import KeyNorm
from kvcompress.policies.scorers.kvzip import KVzip
from kvcompress.policies.scorers.lagkv import LagKV
from kvcompress.policies.scorers.leverage import Leverage
from kvcompress.policies.scorers.mixkv import MixKV
from kvcompress.policies.scorers.position import Position
from kvcompress.policies.scorers.random import Random
from kvcompress.policies.scorers.rkv import RKV
from kvcompress.policies.scorers.snapkv import SnapKV
from kvcompress.policies.scorers.tova import TOVA
from kvcompress.policies.scorers.value_aware import ValueAware

__all__ = [
    "RKV",
    "TOVA",
    "Attention",
    "Defensive",
    "ExpectedAttention",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "Leverage",
    "MixKV",
    "Position",
    "Random",
    "SnapKV",
    "ValueAware",
]
