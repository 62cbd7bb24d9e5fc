"""Plain values, and the few classes of a cache's state, in JSON beside their tensors; nothing else is ever made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.allocation import Allocation, Rule
from kvcompress.cache.packed import Packed
from kvcompress.cache.ragged_packed import RaggedPacked
from kvcompress.cache.recent import Recent
from kvcompress.cache.sequence import Scored
from kvcompress.errors import ConfigError, shown
from kvcompress.files import DIGITS, DTYPES
from kvcompress.policies.context import Codes

_LEVELS = 16  # of lists and mappings inside each other that a user may add
_REPEATS = 2**20  # of what is the same for all rows, such as token indices
_CLASSES = (Allocation, Rule, Scored, Packed, RaggedPacked, Codes, Recent)
_KNOWN: dict[str, Callable[..., Any]] = {one.__name__: one for one in _CLASSES}


def to_json(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """A value in JSON, its tensors by name; the same tensor has one name, however often it comes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = name = f"{len(tensors)}"
            tensors[name] = value[tuple(slice(None) if step else slice(1) for step in value.stride())]
        return {"tensor": names[id(value)], "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        return {"array": to_json(torch.from_numpy(np.ascontiguousarray(value)), tensors, {})}
    if isinstance(value, list):
        return [to_json(one, tensors, names) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [to_json(one, tensors, names) for one in value]}
    if isinstance(value, Mapping):
        return {"dict": [[key, to_json(one, tensors, names)] for key, one in value.items()]}
    must(type(value).__name__ in _KNOWN, f"a {type(value).__name__} cannot be saved")
    fields = {name: to_json(one, tensors, names) for name, one in vars(value).items()}
    return {"object": type(value).__name__, "fields": fields}


def from_json(
    value: Any, tensors: dict[str, Tensor], made: dict[tuple[str, torch.device], Tensor], device: torch.device
) -> Any:
    """The inverse of `to_json`, on a device."""
    if isinstance(value, list):
        return [from_json(one, tensors, made, device) for one in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        name = value["tensor"], device
        if name not in made:
            stored, shape = tensors[value["tensor"]], value["shape"]
            must(all(have == size or size <= _REPEATS for have, size in zip(stored.shape, shape, strict=True)), shape)
            made[name] = stored.to(device).expand(shape)
        return made[name]
    if "array" in value:
        array = from_json(value["array"], tensors, {}, torch.device("cpu")).contiguous().numpy()
        must(array.dtype in (np.int64, np.bool_), f"counts of the type {array.dtype}")
        return array
    if "tuple" in value:
        return tuple(from_json(one, tensors, made, device) for one in value["tuple"])
    if "dict" in value:
        return {key: from_json(one, tensors, made, device) for key, one in value["dict"]}
    fields = {name: from_json(one, tensors, made, device) for name, one in value["fields"].items()}
    return _KNOWN[value["object"]](**fields)


def check_extra(extra: object) -> None:
    """Refuses what a user adds to a saved cache and could not be read again as it was.

    Raises:
        ConfigError: that says where it is, and what can be kept.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise ConfigError(f"extra: must be a mapping of what to keep with the cache; got {shown(extra)}")
    _check_kept("extra", extra or {}, _LEVELS)


def _check_kept(place: str, value: Any, levels: int) -> None:
    if isinstance(value, Tensor):
        _check_tensor(place, value)
    elif not isinstance(value, Mapping | list | tuple):
        _check_plain(place, value)
    elif not levels:
        raise ConfigError(f"{place}: lists and mappings may be {_LEVELS} inside each other; got {shown(value)}")
    else:
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_plain(f"a key of {place}", key)
            _check_kept(f"{place}[{shown(key)}]", one, levels - 1)


def _check_plain(place: str, value: object) -> None:
    """Whether JSON holds a value as it is."""
    if isinstance(value, str):
        fits = value.isascii() or value == value.encode("utf-8", "replace").decode("utf-8")
        allowed = "a text without half surrogate pairs"
    elif isinstance(value, float):
        fits, allowed = math.isfinite(value), "a finite number (tensors hold others)"
    elif isinstance(value, int):
        fits, allowed = abs(value) < 10 ** (DIGITS - 1), f"a number of fewer than {DIGITS} digits"
    else:
        fits = value is None
        allowed = "text, a number, a tensor, a list or a mapping" if place.startswith("extra") else "text or a number"
    if not fits:
        raise ConfigError(f"{place}: must be {allowed} to be kept with the cache; got {shown(value)}")


def _check_tensor(place: str, value: Tensor) -> None:
    if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ConfigError(
            f"{place}: must be a dense tensor of {dtypes}, to be kept with the cache; got {value.dtype}, "
            f"{value.layout}, on {value.device}"
        )


def must(holds: bool, wrong: object) -> None:
    """Refuses what is not as it should be, also where Python leaves assertions out.

    Raises:
        ValueError: that says what is wrong.
    """
    if not holds:
        raise ValueError(str(wrong))
