"""What every side of a compressed cache knows: its state, and the model that it was made for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from kvcompress.cache import attention
from kvcompress.cache.state import CacheState
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.policies.context import LayerWeights

_Module = TypeVar("_Module", bound=nn.Module)


class OfModel:
    """A cache's state, and its model, which it does not keep alive."""

    def __init__(self, state: CacheState, adapter: Adapter, model: PreTrainedModel) -> None:
        """For a model that is not wrapped."""
        self._state, self._adapter = state, adapter
        self._model, self._decoder = weakref.ref(model), weakref.ref(adapter.decoder(model))

    @property
    def config(self) -> CompressionConfig:
        """How it compresses: what was asked for, and from the first prompt on what `auto` chose for that."""
        return self._state.config

    def model(self) -> PreTrainedModel:
        """The model that it was made for.

        Raises:
            CacheStateError: if that no longer exists.
        """
        return alive(self._model)

    def decoder(self) -> PreTrainedModel:
        """The module that owns the decoder layers.

        Raises:
            CacheStateError: if the model no longer exists.
        """
        return alive(self._decoder)

    def check_decoder(self) -> None:
        """Refuses a model that trains or whose attention is another one by now."""
        decoder = self.decoder()
        if not attention.is_installed(decoder):
            raise UnsupportedModeError(
                f"model: its attention was switched to '{decoder.config._attn_implementation}' after the cache was "
                "made; make a new CompressedCache(model, ...), or leave the attention 'kvcompress' in place"
            )
        if decoder.training:
            raise UnsupportedModeError(
                "model: is in training mode; call model.eval() first, or train with another cache"
            )


@dataclass(frozen=True)
class WeightsOf:
    """Gives the weights of a layer, without keeping its model alive."""

    adapter: Adapter
    decoder: weakref.ReferenceType[PreTrainedModel]
    module: weakref.ReferenceType[nn.Module]

    def __call__(self) -> LayerWeights:
        """The weights, as they are now."""
        return self.adapter.layer_weights(alive(self.decoder), alive(self.module))


def alive(reference: weakref.ReferenceType[_Module]) -> _Module:
    """What a reference refers to.

    Raises:
        CacheStateError: if that no longer exists.
    """
    found = reference()
    if found is None:
        raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
    return found
