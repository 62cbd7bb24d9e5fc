"""Layers that stay transformers' own beside those that are compressed: windows, chunks, linear attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class OwnLayers:
    """The cache layers that transformers itself would have, by the number of their decoder layer.

    They hold what their window or their state asks for, whatever the budget, and get every call that changes the
    sequence or the rows.

    Attributes:
        layers: the layers.
        unfinished: whether the decoder was called and did not come to its end, so that layers may not agree.
    """

    def __init__(self, layers: Mapping[int, Any]) -> None:
        """Starts with layers that hold nothing."""
        self.layers = dict(layers)
        self.unfinished = False
        self._empty = {number: copy.deepcopy(vars(layer)) for number, layer in self.layers.items()}

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def first_updated(self) -> int:
        """Number of the first decoder layer that hands keys to the cache."""
        number = 0
        while number in self.layers and not hasattr(self.layers[number], "sliding_window"):
            number += 1
        return number

    @property
    def nbytes(self) -> int:
        """Bytes that they hold."""
        held = (tensor for layer in self.layers.values() for tensor in _tensors(vars(layer)))
        return sum(tensor.nbytes for tensor in held if tensor.ndim > 2)

    @property
    def goes_back(self) -> bool:
        """Whether tokens can be taken back at all: not of a state that sums up all that was seen."""
        return all(hasattr(layer, "sliding_window") for layer in self.layers.values())

    def forget(self) -> None:
        """Forgets everything."""
        self.unfinished = False
        for number, layer in self.layers.items():
            vars(layer).clear()
            vars(layer).update(copy.deepcopy(self._empty[number]))

    def record(self, past: bool) -> None:
        """Lets windows keep what has left them until `crop`, or no longer."""
        for layer in self.layers.values():
            if hasattr(layer, "record_past"):
                layer.record_past = past

    def refusal(self, positions: int) -> str | None:
        """Why the last positions cannot be taken back; None if they can."""
        for number, layer in self.layers.items():
            if not self.goes_back:
                return (
                    f"crop: layer {number} keeps a state of all that was seen ({type(layer).__name__}), out of which "
                    "no token can be taken again; take copy.deepcopy(cache) before a forward that may be undone"
                )
            held = layer.keys.shape[2] if layer.is_initialized else 0
            if held - positions < min(layer.get_seq_length() - positions, layer.sliding_window - 1):
                return (
                    f"crop: the window of layer {number} has moved on, so that it no longer holds what came before the "
                    f"last {positions} tokens; call activate_past_recording() before a forward that may be undone, or "
                    "take copy.deepcopy(cache) before it"
                )
        return None

    def crop(self, positions: int) -> None:
        """Takes the last positions back, and lets windows give up what has left them."""
        for layer in self.layers.values():
            if positions or getattr(layer, "record_past", False):
                layer.crop(-positions)

    def select_rows(self, index: Tensor) -> None:
        """Reorders, repeats or drops rows."""
        for layer in self.layers.values():
            layer.reorder_cache(index)

    def parts(self) -> Iterator[Any]:
        """Everything whose attributes change."""
        yield from (self, *self.layers.values())

    # -- on disk -------------------------------------------------------------------------------------------------------

    def saved(self) -> dict[int, Any]:
        """What has to be kept to go on elsewhere."""
        return {number: _plain(vars(layer)) for number, layer in self.layers.items()}

    def restore(self, saved: Mapping[int, Any], devices: Mapping[int, torch.device]) -> None:
        """Takes over what `saved` gave; tensors are on those devices.

        Raises:
            ValueError: if it is of other layers.
        """
        if set(saved) != set(self.layers):
            raise ValueError(f"layers {sorted(saved)} in place of {sorted(self.layers)}")
        for number, layer in self.layers.items():
            if not set(saved[number]) <= set(self._empty[number]) | {"device", "dtype"}:
                raise ValueError(f"other attributes of layer {number}")
            vars(layer).update(saved[number])
            first = next((tensor for tensor in _tensors(saved[number]) if tensor.ndim > 2), None)
            if first is not None:
                layer.device, layer.dtype = devices[number], first.dtype


def _tensors(values: Mapping[Any, Any]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _plain(values: Mapping[Any, Any]) -> dict[Any, Any]:
    kept = {name: value for name, value in values.items() if not isinstance(value, torch.device | torch.dtype)}
    return {name: _plain(value) if isinstance(value, dict) else value for name, value in kept.items()}
