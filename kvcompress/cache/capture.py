"""Decode steps that are captured once and replayed, so that no device waits for Python."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from kvcompress.cache import decoding, periods
from kvcompress.cache.argument import cache_among
from kvcompress.cache.inputs import tokens_to_come
from kvcompress.cache.state import CacheState
from kvcompress.errors import KVCompressWarning


@runtime_checkable
class Graph(Protocol):
    """What a device was asked to do, to be asked again as it is: the same work on the same addresses."""

    def capture(self, run: Callable[[], Any]) -> Any:
        """Takes down what a function asks of the device, without doing it; returns what the function returns."""

    def replay(self) -> None:
        """Does it all; what was returned holds the new results."""


class CudaGraph:
    """A CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        """Starts empty; what other devices are asked meanwhile would not be part of it."""
        self.graph, self.device = torch.cuda.CUDAGraph(), device

    def capture(self, run: Callable[[], Any]) -> Any:
        """Other threads may go on using their streams in the meantime."""
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Launches it as a whole."""
        self.graph.replay()


_WORTH_CAPTURING = 32  # tokens to come
GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": CudaGraph}  # by type of device


def plan(
    way: str, state: CacheState, model: PreTrainedModel, inputs: dict[str, Any]
) -> tuple[dict[str, Any], CapturedDecoding | None]:
    """How `generate` decodes: what to add to its arguments, and what stands in for the model's forward, if anything.

    Args:
        way: what the cache was told, "captured", "compiled" or "eager".
        state: of the cache; hears how many tokens are to come.
        model: the model that generates.
        inputs: what `generate` was given.
    """
    given = inputs.get("generation_config") or model.generation_config
    told = any(inputs.get(name, getattr(given, name, None)) for name in ("compile_config", "disable_compile"))
    if told or model.device.type not in GRAPHS or not decoding.compiles(state):
        return {}, None
    coming = tokens_to_come(model, inputs)
    if way == "eager" or (way == "captured" and coming < _WORTH_CAPTURING):
        return {"disable_compile": True}, None
    state.coming = coming
    return {}, CapturedDecoding(model, state) if way == "captured" else None


@dataclass
class _Captured:
    """A step that can be replayed: its graph, the tensors that it reads, and what the model returned, taken apart."""

    graph: Graph
    inputs: dict[str, Tensor]
    returned: list[Any]
    form: TreeSpec

    def replay(self, tensors: Mapping[str, Tensor]) -> Any:
        """What the model returns for these inputs, in tensors of its own."""
        for name, value in tensors.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return tree_unflatten(map(_apart, self.returned), self.form)


class CapturedDecoding:
    """Stands in for a model's forward in the decode steps of one `generate`.

    The first step with buffers of some size runs as ever, so that kernels are there; the second is captured; all others
    replay it. The host only counts along and lets buffers grow, after which a step is captured anew. Where capturing
    fails, all steps run as ever, and a warning says why.
    """

    def __init__(self, model: nn.Module, state: CacheState) -> None:
        """Nothing is captured yet.

        Args:
            model: the model.
            state: of the cache that it decodes with.
        """
        self.model, self.state = model, state
        self._captured: dict[Any, _Captured | None] = {}  # None after the first step
        self._holders: list[object] = []  # those whose places are known
        self._places: Any = ()
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self._fails = len(devices) > 1  # a graph would hold what one of them does, and no more

    def __call__(self, **inputs: Any) -> Any:
        """What the model returns for one token of every row."""
        state, table = self.state, self.state.table
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict) and all(value is None for value in mask.values()):
            inputs["attention_mask"] = None  # one for each kind of layer, and none of them says anything
        ids = inputs.get("input_ids")
        one = isinstance(ids, Tensor) and ids.shape[1] == 1 and inputs.get("attention_mask") is None
        usual = cache_among(inputs) is not None and table is not None and table.exact and state.step is None
        if self._fails or not (one and usual) or state.recording or len(state.devices) > 1:
            return self.model(**inputs)
        decoding.count(state)
        with state.on_device():
            output = self._run(inputs)
        decoding.finish(state)
        periods.cut_if_due(state)
        return output

    def _run(self, inputs: dict[str, Any]) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        key = (_shapes(tensors), _given(others), self._where())
        if key not in self._captured:
            self._captured = {key: None}  # what stood for other buffers does not come back
            return self.model(**inputs)
        step = self._captured[key]
        if step is None:
            step = self._capture(inputs, tensors)
            if step is None:
                return self.model(**inputs)
            self._captured[key] = step
        self.state.ran = "captured"
        return step.replay(tensors)

    def _where(self) -> Any:
        """Where the cache's buffers are; asked of every tensor only where some object that holds them is another."""
        holders = self.state.holders()
        if len(holders) != len(self._holders) or not all(map(operator.is_, holders, self._holders)):
            self._holders, self._places = holders, self.state.places()
        return self._places

    def _capture(self, inputs: dict[str, Any], tensors: Mapping[str, Tensor]) -> _Captured | None:
        device = next(iter(self.state.devices))
        graph = GRAPHS[device.type](device)
        fixed = {name: value.clone() for name, value in tensors.items()}
        step = self.state.step
        assert step is not None
        try:
            output = graph.capture(lambda: self.model(**{**inputs, **fixed}))
        except RuntimeError as error:  # nothing was done to the cache: what is captured does not run
            self._fails, step.next_layer = True, 0
            warnings.warn(
                f"decoding: a step of {type(self.model).__name__} cannot be captured, so every step runs in Python, "
                f"which is slower ({error}); CompressedCache(..., decoding='eager') does so without trying",
                KVCompressWarning,
                stacklevel=2,
            )
            return None
        return _Captured(graph, fixed, *tree_flatten(output))


def _shapes(tensors: Mapping[str, Tensor]) -> Any:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def _given(others: Mapping[str, Any]) -> Any:
    """Other arguments of a model's forward, of which objects are the same as long as they are themselves."""
    plain = (int, float, str, type(None))
    return tuple((name, value if isinstance(value, plain) else id(value)) for name, value in others.items())


def _apart(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
