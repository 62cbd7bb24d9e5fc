"""Attention over the slots of a cache, and what it tells about them; tensors in, tensors out."""

from kvcompress.kernels.dense import (
    attention,
    attention_mass,
    attention_probabilities,
    attention_share,
    attention_with_lse,
    masked_attention_with_lse,
    merge_attention,
    without_autocast,
)

__all__ = [
    "attention",
    "attention_mass",
    "attention_probabilities",
    "attention_share",
    "attention_with_lse",
    "masked_attention_with_lse",
    "merge_attention",
    "without_autocast",
]
