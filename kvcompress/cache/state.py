"""What a compressed cache knows, and how it changes as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.allocation import Allocation, Rule
from kvcompress.cache.calls import Calls
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import Phase, Prefill, Step
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.parallel import HeadGroup


class CacheState:
    """Everything that a cache knows beside its model.

    Attributes:
        config: the policies and the budget.
        layers: the decoder layers, each with what it holds.
        heads: the processes that share the heads.
        reserve: tokens that buffers get room for at once where they grow; 0 for a little at a time.
        calls: what the hooks told of the call in progress.
        sequence: what was seen.
        rule: what the budget says of a row.
        allocation: what the last allocation gave.
        table: where tokens lie while the model decodes; None until the next step makes it.
        recording: whether eviction waits for `crop`.
        waiting: kind of the step whose eviction waits.
        step: forward in progress; what is interrupted stays, and the cache is broken.
        reduced: what became of images in a step whose last layer has attended.
    """

    def __init__(self, config: CompressionConfig, layers: int, heads: HeadGroup, calls: Calls, reserve: int) -> None:
        """Starts with nothing seen."""
        self.config, self.heads, self.calls, self.reserve = config, heads, calls, reserve
        self.sequence = Sequence()
        self.layers = [CompressedLayer(number, config, self.sequence, heads) for number in range(layers)]
        self._start()

    def _start(self) -> None:
        self.rule = Rule.of(self.config, len(self.layers))
        self.allocation: Allocation | None = None
        self.table: SlotTable | None = None
        self.recording = False
        self.waiting: Phase | None = None
        self.reduced: Reduction | None = None
        self.step: Step | None = None

    def forget(self) -> None:
        """Forgets all that was seen, also after a forward that failed."""
        self.step = Prefill()  # until everything is forgotten
        self.sequence = Sequence()
        for layer in self.layers:
            layer.forget(self.sequence)
        self.calls.crop(0)
        self._start()

    @contextmanager
    def changing(self, in_place: bool = False) -> Iterator[Prefill]:
        """A change of everything that the cache holds, which comes to its end or changes nothing.

        Args:
            in_place: whether tensors are changed where they are; then what fails leaves a cache that is broken until
                `reset`.
        """
        before = None if in_place else self._parts()
        self.step = step = Prefill()
        try:
            with self.writable(), torch.no_grad():
                yield step
        except BaseException:
            if before is not None:
                for thing, attributes in before:
                    thing.__dict__.clear()
                    thing.__dict__.update(attributes)
            raise
        self.step = None

    def _parts(self) -> list[tuple[Any, dict[str, Any]]]:
        """What the cache and its parts refer to, so that they can be made to do so again; the cache itself last."""
        parts: list[Any] = [self.sequence, self.calls, *self.layers, *(layer.store for layer in self.layers)]
        parts += [part for part in (self.table, self.allocation) if part is not None]
        return [(part, {name: _apart(value) for name, value in vars(part).items()}) for part in (*parts, self)]

    def saved(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere, as plain values; the host must know of every step."""
        table = self.table
        return {
            "sequence": self.sequence.saved(),
            "calls": self.calls.saved(),
            "layers": [layer.saved() for layer in self.layers if layer.is_initialized],
            "allocation": self.allocation,
            "rule": self.rule,
            "recording": self.recording,
            "table": None if table is None else table.saved(),
            "table_evicts": table is not None and table.evicts,
        }

    def restore(self, saved: dict[str, Any], devices: list[torch.device]) -> None:
        """Takes over what `saved` gave; layers and their tensors are on those devices."""
        self.sequence.restore(saved["sequence"])
        self.calls.restore(saved["calls"])
        if saved["layers"]:
            for layer, kept, device in zip(self.layers, saved["layers"], devices, strict=True):
                layer.restore(kept, device)
        self.allocation, self.rule, self.recording = saved["allocation"], saved["rule"], bool(saved["recording"])
        if saved["table"] is not None:
            allocation = self.allocation if saved["table_evicts"] else None
            self.table = SlotTable.from_saved(saved["table"], allocation, self.rule)

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        keys = self.layers[0].store.keys
        assert keys is not None
        return keys.dtype

    def writable(self) -> AbstractContextManager[Any]:
        """Lets buffers that were made in inference mode be written to, also by a caller who has left it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return nullcontext()
        keys = self.layers[0].store.keys
        table = self.table
        made_in_it = (keys is not None and keys.is_inference()) or (table is not None and table.index.is_inference())
        return torch.inference_mode() if made_in_it else nullcontext()

    def check_ready(self) -> None:
        """Refuses to go on after a step that failed.

        Raises:
            CacheStateError: naming the way out.
        """
        if self.step is not None:
            raise self.broken()

    def broken(self) -> CacheStateError:
        """What to raise where an earlier step did not come to its end."""
        return CacheStateError(
            "cache: an earlier forward failed half-way, so its layers no longer agree; call reset() and run the prompt "
            "again"
        )

    def limits(self) -> np.ndarray | None:
        """Slots that each layer may hold now, `[layers, batch]`; None if nothing is ever evicted while decoding."""
        evictor = self.config.evictor
        if evictor is None or evictor.frees == "nothing" or self.allocation is None:
            return None
        return self.allocation.limits(self.rule, self.sequence.row_seen)

    def index_of(self, layer: CompressedLayer) -> Tensor:
        """Token index of a layer's slots, wherever it is kept now; -1 where a slot is empty."""
        assert layer.index is not None
        table = self.table
        if table is None or not (table.steps or not table.exact):
            return layer.index
        index = table.index[layer.number]
        slots = torch.arange(index.shape[-1], device=index.device)
        index = index.masked_fill(slots == table.free[layer.number].unsqueeze(-1), -1)
        packed = layer.index[..., : layer.store.packed].to(index.device).expand(-1, index.shape[1], -1)
        return torch.cat([packed, index], 2)


def _apart(value: Any) -> Any:
    """A list or a mapping of its own, with the same things in it."""
    return copy.copy(value) if isinstance(value, list | dict) else value
