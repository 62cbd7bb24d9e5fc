"""How models of transformers take a cache: as `cache`, and as `past_key_values` before transformers 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin

NAMES = ("cache", "past_key_values")


_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_INSTALLED = next((name for name in NAMES if name in _PARAMETERS), NAMES[0])


def installed_name() -> str:
    """The name that the installed transformers gives the argument in `generate`, models and layers."""
    return _INSTALLED


def cache_argument(cache: object) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model, as in `model(ids, **cache_argument(cache))`."""
    return {installed_name(): cache}


def cache_among(arguments: Mapping[str, Any]) -> object:
    """The cache among a forward's arguments, under whichever name it comes; None if there is none."""
    for name in NAMES:
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def under_installed_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the cache under the name that the installed transformers knows.

    Releases before 5.24 would let `cache=` through a forward without a word and make a cache of their own. The old name
    is left to the releases after them, which say that it is deprecated.
    """
    if installed_name() == "cache" or arguments.get("cache") is None:
        return arguments
    renamed = {name: value for name, value in arguments.items() if name not in NAMES}
    return {**renamed, installed_name(): cache_among(arguments)}
