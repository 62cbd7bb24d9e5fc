"""The reference of `kvcompress.testing`, for the tiny models by name."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from kvcompress.testing import reference
from kvcompress.testing.reference import Held, Step, decoder_layers, held, recorded
from tests import tiny

__all__ = ["Held", "Reference", "Step", "decoder_layers", "held", "recorded"]


@functools.cache
def _prepared(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return reference.prepare(tiny.build(name, dtype))


class Reference(reference.Reference):
    """A model of the same weights with a DynamicCache, whose layers see the columns they are told to."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        """Starts with nothing seen."""
        super().__init__(_prepared(name, dtype))
