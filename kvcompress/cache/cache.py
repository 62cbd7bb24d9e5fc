"""The cache object that `generate()` and plain forwards take as `cache`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.cache import attention, hooks, saving
from kvcompress.cache.allocation import Allocation, Rule, allocate
from kvcompress.cache.calls import Calls
from kvcompress.cache.inputs import shape_of
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.renumbering import moved_back
from kvcompress.cache.report import CacheReport
from kvcompress.cache.selection import Ranked, gather_importance
from kvcompress.cache.sequence import Counts, Sequence
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import Mask, Phase, Step
from kvcompress.config import CompressionConfig
from kvcompress.config.profile import LayerProfile, check_profiles, profile_override
from kvcompress.errors import CacheStateError, UnsupportedModeError
from kvcompress.integrations import Adapter, adapter_for
from kvcompress.kernels import decode_bias
from kvcompress.parallel import ALONE
from kvcompress.policies.context import AllocationContext, LayerWeights
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout

_COMPILED_BLOCK = 256  # steps that buffers get room for at once where steps are compiled
_BLOCK = 16  # slots by which a buffer grows at least, unless `reserve` says more


class CompressedCache(Cache, hooks.ObservesInputs, hooks.ReducesTokens):
    """A key-value cache that stays within a budget; pass it to a model as `cache`.

    Releases of transformers before 5.24 call that argument `past_key_values`.

    Args:
        model: the model that will use it; its decoder gets the attention "kvcompress", which behaves as before with
            any other cache (`kvcompress.restore(model)` takes it off again).
        config: a preset's name, a `CompressionConfig`, a dict, or the path of a .yaml or .json file.
        profile: a `LayerProfile` or its file, in place of the allocator.
        reserve: tokens that are about to be generated: buffers get room for so many at once where they grow, in place
            of a little at a time. To be given where decoding is compiled by hand.
        **overrides: fields of the configuration to replace, for instance `budget=0.2`.

    Raises:
        ConfigError: if the configuration is wrong or a profile is another model's; the model is untouched then.
        UnsupportedModelError: if no adapter knows the model, one of its layers does not attend to all tokens, or
            several processes share it in another way than by whole heads.

    Example:
        >>> cache = CompressedCache(model, "prefixkv", budget=0.5)
        >>> output = model.generate(**inputs, cache=cache, max_new_tokens=4)
        >>> cache.report().retention <= 0.5
        True
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        model: PreTrainedModel,
        config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "prefixkv",
        *,
        profile: LayerProfile | str | PathLike[str] | None = None,
        reserve: int = 0,
        **overrides: Any,
    ) -> None:
        self.config = CompressionConfig.read(config, **profile_override(profile, overrides))
        adapter = adapter_for(model)
        check_profiles(self.config, adapter.decoder(model))
        layers = len(adapter.layers(model))
        if self.config.reducer is not None:
            with policy_errors(self.config.reducer):
                self.config.reducer.acts_after(layers)  # complains before anything is touched
        decoder = adapter.decoder(model)
        self._adapter, self._decoder = adapter, weakref.ref(decoder)
        # A bare decoder may be part of a model that sees images, which its adapter cannot know.
        may_see_images, reduces = adapter.sees_images or decoder is model, self.config.reducer is not None
        self._calls = Calls(reduces or (may_see_images and self.config.reads_modality), adapter.sees_images, reduces)
        self._heads, self._reserve = adapter.head_group(model), reserve
        self._sequence = Sequence()
        super().__init__(
            layers=[CompressedLayer(number, self.config, self._sequence, self._heads) for number in range(layers)]
        )
        self._forget()
        with hooks.changing:
            attention.install(decoder, adapter.attention_modules(model))
            hooks.observe(model, decoder, adapter)
            if self.config.reducer is not None:
                hooks.reduce_between(adapter.layers(model))

    def _forget(self) -> None:
        self._allocation: Allocation | None = None
        self._rule = Rule.of(self.config, len(self.layers))
        self._table: SlotTable | None = None
        self._recording = False
        self._waiting: Phase | None = None  # kind of the step whose eviction waits
        self._layout: ImageLayout | None = None  # of the images of the step about to begin
        self._mask: Mask | None = None  # what the mask of the step about to begin says, if anything
        self._reduced: Reduction | None = None  # of a step whose last layer has attended
        self._step: Step | None = None  # in progress; what is interrupted stays, and the cache is broken

    def __repr__(self) -> str:
        return f"CompressedCache({self.config!r}, seen={self._sequence.seen})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses to be pickled, since the model stays behind.

        Raises:
            UnsupportedModeError: naming the ways out.
        """
        raise UnsupportedModeError(
            "cache: it belongs to a model of this process and cannot be pickled; within the process, take "
            "copy.deepcopy(cache); for another one, cache.save(folder) and CompressedCache.load(model, folder) there"
        )

    # -- on disk -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes what the cache holds, to go on in another process: `cache.json` and a file of tensors (safetensors).

        The cache stays as it is. Another process sees the old cache or the new one, never a part of one.

        Args:
            folder: where to; made where it is missing.
            overwrite: whether a cache that was saved there is replaced.

        Raises:
            ConfigError: if the folder cannot be written, or holds a cache already, or a `cache.json` of somebody else.
            CacheStateError: if a forward failed half-way, or may still be undone.
            UnsupportedModeError: if several processes share the heads.

        Example:
            >>> cache = CompressedCache(model, "prefixkv", budget=0.5)
            >>> output = model.generate(**inputs, cache=cache, max_new_tokens=4)
            >>> cache.save(folder / "story")
            >>> again = CompressedCache.load(model, folder / "story")
            >>> again.report() == cache.report()
            True
        """
        saving.save(self, self.decoder(), folder, overwrite=overwrite)

    @classmethod
    def load(cls, model: PreTrainedModel, folder: str | PathLike[str], *, reserve: int = 0) -> CompressedCache:
        """Reads a cache that `save` wrote; decoding goes on to the bit as with the one that was saved.

        Nothing in the folder is run. Policies of your own must be registered before.

        Args:
            model: the model it was saved from, in the same dtype; in any process, on any device.
            folder: where it was saved.
            reserve: as for a new cache.

        Raises:
            ConfigError: if the folder holds no cache, a damaged one, or one of another model or release.
            UnsupportedModelError: as for a new cache.
        """
        return saving.load(cls, model, folder, reserve=reserve)[0]

    def decoder(self) -> PreTrainedModel:
        """The module that owns the decoder layers.

        Raises:
            CacheStateError: if the model no longer exists.
        """
        decoder = self._decoder()
        if decoder is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        return decoder

    def state(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere, as plain values; changes nothing.

        Raises:
            CacheStateError: if a forward failed half-way, or may still be undone.
            UnsupportedModeError: if several processes share the heads.
        """
        self._check_ready()
        saving.refuse_unsaveable(self._heads is not ALONE, self._waiting is not None)
        self._catch_up_if_needed()
        table = self._table
        return {
            "sequence": self._sequence.state(),
            "calls": self._calls.state(),
            "layers": [layer.state() for layer in self.layers if layer.is_initialized],
            "allocation": self._allocation,
            "rule": self._rule,
            "recording": self._recording,
            "table": None if table is None else table.state(),
            "table_evicts": table is not None and table.evicts,
        }

    def restore_state(self, state: dict[str, Any], devices: list[torch.device]) -> None:
        """Takes over what `state` gave; layers and their tensors are on those devices."""
        self._sequence.restore(state["sequence"])
        self._calls.restore(state["calls"])
        if state["layers"]:
            for layer, kept, device in zip(self.layers, state["layers"], devices, strict=True):
                layer.restore(kept, device)
        self._allocation, self._rule, self._recording = state["allocation"], state["rule"], bool(state["recording"])
        if state["table"] is not None:
            allocation = self._allocation if state["table_evicts"] else None
            self._table = SlotTable.from_state(state["table"], allocation, self._rule)

    # -- a step --------------------------------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Takes a layer through the step in progress, which the first layer begins and the last ends."""
        if layer == 0:
            self._begin(query)
        step = self._step
        if step is None or step.next_layer != layer:
            raise self._broken()
        with self._writable():
            weights = _Weights(self._adapter, self._decoder, weakref.ref(module))
            output = self.layers[layer].attend(step, self._table, query, key, value, scaling, weights)
            step.next_layer += 1
            if step.next_layer == len(self.layers):
                self._end(step)
        return _usable(output)

    def _begin(self, query: Tensor) -> None:
        """Makes the step of a forward, and takes note of its tokens."""
        if torch.compiler.is_compiling():  # only decode steps are compiled, after a prefill step that made the table
            self._begin_decode()
            return
        self._check_ready()
        batch, _, queries, _ = query.shape
        sequence = self._sequence
        if sequence.batch not in (0, batch):
            raise CacheStateError(
                f"batch: the cache holds {sequence.batch} rows, this forward has {batch}; call reset() for another "
                "batch, or batch_repeat_interleave / batch_select_indices to change the rows"
            )
        if self._waiting is not None:
            self._recording = False  # nobody cropped after the last forward, so nobody is rolling back
            self.compress()
        says, self._mask = self._mask, None
        if queries == 1 and sequence.seen and says is None:
            self._begin_decode()
        else:
            self._begin_prefill(query, says or Mask(None, None, np.full(batch, queries), None))

    def _begin_decode(self) -> None:
        sequence, table = self._sequence, self._table
        if table is None:
            table = self._make_table()
        evicts = not self._recording
        step = self._step = Step(Phase.DECODE, evicts=evicts)
        alike = False
        if torch.compiler.is_compiling():
            table.exact = False
        else:
            sequence.extend(None, 1, np.ones(sequence.batch, dtype=np.int64), scored=False)
            table.count(sequence.row_seen, evicts)
            if table.exact:
                step.widths = table.extent.max(1).tolist()
                alike = bool((table.extent == table.extent[:, :1]).all())
        with self._writable():
            if step.widths is not None:
                self._make_room()
            table.advance(evicts)
        if not alike:
            step.bias = decode_bias(table.length, table.capacity, self._dtype())
        evictor = self.config.evictor
        if evicts and evictor is not None and evictor.frees == "chosen" and self._allocation is not None:
            step.over = table.over()
        merger = self.config.merger
        step.merges = evicts and merger is not None and merger.merges_decoding

    def _begin_prefill(self, query: Tensor, mask: Mask) -> None:
        batch, _, queries, _ = query.shape
        self._catch_up_if_needed()
        sequence, first = self._sequence, self._sequence.seen
        step = Step(Phase.PREFILL, columns=queries, evicts=not self._recording, row_new=mask.row_new)
        self._step, self._reduced = step, None  # from here on, what is interrupted has failed
        self._tidy()
        new_valid, step.order, step.first_order = mask.new_valid, mask.order, mask.order
        if mask.hidden is not None:
            self._hide(mask.hidden)
        sequence.extend(new_valid, queries, step.row_new)
        step.row_seen = sequence.row_seen
        index = sequence.index_of_columns(query.device)[:, first:]
        if step.order is not None:
            index = index.gather(1, step.order)
            new_valid = index >= 0
        step.index, step.valid = index.expand(batch, -1).to(torch.int32).unsqueeze(1), new_valid
        layout, self._layout = self._layout, None
        if layout is not None and self.config.reducer is not None:
            points = self.config.reducer.acts_after(len(self.layers))
            if points:
                step.reduction = self._reduction(step, layout, points)
        if not (self.config.evictor is None or self._recording or step.reduction is not None):
            if not self.config.allocator.reads_importance:
                before = [np.broadcast_to(layer.held if len(layer.held) else 0, batch) for layer in self.layers]
                step.local = partial(self._allocate_once, np.stack(before) + step.row_new, query.device)

    def _read_mask(self, mask: Tensor | None, queries: int) -> Mask | None:
        """What a mask says; None if it says nothing but that tokens are as they were and all new columns hold one.

        Waits for the device once if there is a mask, unless it is on the CPU and says nothing. Changes nothing.

        Raises:
            CacheStateError: if the mask does not cover what was seen, or shows what was padding.
        """
        sequence, seen = self._sequence, self._sequence.seen
        if mask is None or self._says_nothing(mask):
            return None
        columns = mask.to(torch.bool)
        past, new = columns[:, :seen], columns[:, seen : seen + queries]
        known = sequence.known_valid(columns.device) if seen else past
        hidden, unordered = known & ~past, new[:, 1:] < new[:, :-1]
        flags = hidden.any(), (past & ~known).any(), new.all(), unordered.any(), new[:, -1].any()
        counts = torch.cat([torch.stack(flags).long(), new.sum(1)]).tolist()
        hides, shows, whole, mixed, any_last = map(bool, counts[:5])
        if seen and not any_last:
            raise CacheStateError(
                f"attention_mask: hides the last of the {queries} new tokens in every row; it must cover the {seen} "
                "tokens seen and the new ones. For a new conversation call reset()"
            )
        if shows:
            row, column = (past & ~known).nonzero()[0].tolist()
            raise CacheStateError(
                f"attention_mask: shows column {column} of row {row}, which an earlier mask hid, so the cache no "
                "longer holds it; go on hiding it, or call reset() and run the whole conversation again"
            )
        if whole and not hides:
            return None
        order = new.to(torch.uint8).argsort(dim=1, stable=True) if mixed else None
        row_new = np.asarray(counts[5:], dtype=np.int64)
        return Mask(hidden if hides else None, None if whole else new, row_new, order)

    def _says_nothing(self, mask: Tensor) -> bool:
        """Whether a mask shows all that was seen and all that is new; on the CPU, where nobody has to wait for it."""
        if mask.device.type != "cpu":
            return False
        shown, known = mask.numpy() != 0, self._sequence.valid
        if known is None:
            return bool(shown.all())
        width = known.shape[1]
        return bool((shown[:, :width] == known.numpy()).all() and shown[:, width:].all())

    def _hide(self, hidden: Tensor) -> None:
        """Gives up tokens that an attention mask hides from now on, as if they had been padding."""
        new_index = self._sequence.hide(hidden)
        with self._writable():
            for layer in self.layers:
                layer.renumber(new_index)

    def _end(self, step: Step) -> None:
        """Compresses all layers where their sizes depend on each other, and makes the table for decoding."""
        if step.phase is Phase.PREFILL:
            if self._recording:
                self._waiting = Phase.PREFILL
            elif self.config.evictor is None:
                for layer in self.layers:
                    layer.close_ranks(room=self._reserve)
                    layer.pack()
            elif step.local is None:
                self._compress_all(step)
            step.problems.refuse()
            self._make_table()
            if self._reserve:
                self._grow_for(self._reserve)
        elif self._recording:
            self._waiting = Phase.DECODE
        elif self.config.quantizer is not None:
            self._pack()
        self._step, self._reduced = None, step.reduction

    def _compress_all(self, step: Step) -> None:
        """Allocates over all layers, then lets each keep what it may."""
        ranked = [layer.ranked() for layer in self.layers]
        importance, context = gather_importance(self.layers, self.config, self._sequence, ranked)
        held, context = np.stack([layer.held for layer in self.layers]), replace(context, problems=step.problems)
        self._allocation = self._allocate(held, importance.device, importance, context)
        step.room = self._room_for(self._allocation)
        for layer, known in zip(self.layers, ranked, strict=True):
            layer.compress(step, self._allocation, known)

    def _allocate_once(self, held: np.ndarray, device: torch.device) -> Allocation:
        """The budgets of a step whose allocator reads no scores; found when the first layer has its tokens."""
        step = self._step
        assert step is not None
        if step.next_layer == 0:
            self._allocation = self._allocate(held, device)
            step.room = self._room_for(self._allocation)
        assert self._allocation is not None
        return self._allocation

    def _allocate(
        self,
        held: np.ndarray,
        device: torch.device,
        importance: Tensor | None = None,
        context: AllocationContext | None = None,
    ) -> Allocation:
        self._rule = self._budget_rule()
        return allocate(self.config, self._rule, self._sequence.row_seen, held, device, importance, context)

    def _room_for(self, allocation: Allocation) -> list[int]:
        """Slots to allocate beyond each layer's budget: for the token that comes, and what is reserved."""
        evictor, row_seen = self.config.evictor, self._sequence.row_seen
        if evictor is None or evictor.frees == "nothing":
            return [self._reserve] * len(self.layers)
        later = allocation.limits(self._rule, row_seen + self._reserve).max(1)
        grown = np.minimum(np.maximum(0, later - allocation.budgets.max(1)), self._reserve)
        return [int(slots) + 1 for slots in grown]

    def _budget_rule(self) -> Rule:
        """What the budget says of a row; bytes are shared by all rows, layers and processes."""
        budget, layers = self.config.budget, len(self.layers)
        if budget.bytes is None:
            return Rule.of(self.config, layers)
        shares = layers * self._sequence.batch * self._heads.size
        known = [layer.store for layer in self.layers if layer.store.capacity]
        slots = sum(store.slots_within(budget.bytes / shares) for store in known) * layers / len(known)
        return Rule.of(self.config, layers, slots)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _make_table(self) -> SlotTable:
        """The table for the decode steps to come, from what the layers hold now."""
        layers, sequence, evictor = self.layers, self._sequence, self.config.evictor
        packed = np.stack([layer.packed_rows for layer in layers])
        held = np.stack([layer.held for layer in layers])
        pinned = np.stack([layer.pinned if len(layer.pinned) else layer.held * 0 for layer in layers])
        frees = "nothing" if evictor is None else evictor.frees
        self._table = SlotTable(
            [layer.index[..., layer.store.packed :] for layer in layers],  # type: ignore[index]
            held - packed,
            np.maximum(0, np.maximum(pinned, packed) - packed),
            [layer.store.capacity for layer in layers],
            sequence.row_seen,
            sequence.seen,
            None if frees == "nothing" else self._allocation,
            self._rule,
            by_age=frees == "oldest",
            scored_end=sequence.scored.end,
            packed=packed if packed.any() else None,
            sets=layers[0].kv_heads if evictor is not None and evictor.by_head else 1,
        )
        if frees == "chosen" and layers[0].unscored is None:
            for layer in layers:
                layer.rank_slots(self._table.capacity)
        return self._table

    def _make_room(self) -> None:
        """Lets the buffers grow that this step needs larger, by a block."""
        table = self._table
        assert table is not None
        needed = table.extent.max(1)
        for layer, slots in zip(self.layers, needed.tolist(), strict=True):
            layer.slots = slots
        if any(layer.store.capacity < layer.slots for layer in self.layers):
            self._grow_for(self._block(int(needed.max())), needed)

    def _prepare_step(self) -> None:
        """Sees to it that every buffer has room for the next step, which may be a compiled one that cannot grow any."""
        table = self._table
        if table is None or self._recording or self._step is not None:
            return
        if not table.exact:
            table.steps += 1  # at most: this may be asked more than once before a step
        needed = table.bound(1)
        if any(layer.store.capacity < slots for layer, slots in zip(self.layers, needed.tolist(), strict=True)):
            self._catch_up_if_needed()
            self._grow_for(self._reserve or self._block(int(needed.max())))

    def _grow_for(self, steps: int, needed: np.ndarray | None = None) -> None:
        """Gives every buffer that is too small for what is needed, or for the next step, room for so many steps."""
        table = self._table
        assert table is not None
        needed, wanted = table.bound(1) if needed is None else needed, table.bound(steps)
        with self._writable():
            if wanted.max() > table.capacity:
                table.grow(int(wanted.max()))
                for layer in self.layers:
                    layer.rank_more(table.capacity)
            for layer, least, most in zip(self.layers, needed.tolist(), wanted.tolist(), strict=True):
                if layer.store.capacity < least or self._reserve:
                    layer.store.grow(max(least, most))

    def _block(self, slots: int) -> int:
        """Steps that buffers get room for where they grow: what is reserved, or a few where nothing is compiled."""
        if self._reserve:
            return self._reserve
        on_cpu = self.layers[0].device is None or self.layers[0].device.type == "cpu"
        return max(_BLOCK - 1, slots // 100) if on_cpu else _COMPILED_BLOCK

    def _tidy(self) -> None:
        """Brings the tokens of every layer in order again after decode steps."""
        table, self._table = self._table, None
        if table is None:
            return
        if not table.exact:
            self._catch_up(table)
        if table.steps:
            with self._writable():
                for layer in self.layers:
                    layer.tidy(table)

    def _catch_up(self, table: SlotTable) -> None:
        """Learns from the device how far it has come; waits for it."""
        more = table.settle() - self._sequence.seen
        for layer, slots in zip(self.layers, table.extent.max(1).tolist(), strict=True):
            layer.slots = slots
        if more:
            self._sequence.extend(None, more, np.full(self._sequence.batch, more), scored=False)

    def _pack(self) -> None:
        """Quantizes what has become old enough, once some layer has a group of it."""
        table, quantizer = self._table, self.config.quantizer
        assert table is not None and quantizer is not None
        if ((table.extent - table.hole).max() - quantizer.residual) >= quantizer.group:
            self._tidy()
            for layer in self.layers:
                layer.pack()
            self._make_table()

    def _dtype(self) -> torch.dtype:
        keys = self.layers[0].store.keys
        assert keys is not None
        return keys.dtype

    def _writable(self) -> AbstractContextManager[Any]:
        """Lets buffers that were made in inference mode be written to, also by a caller who has left it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return nullcontext()
        keys = self.layers[0].store.keys
        table = self._table
        made_in_it = (keys is not None and keys.is_inference()) or (table is not None and table.index.is_inference())
        return torch.inference_mode() if made_in_it else nullcontext()

    # -- reducing ------------------------------------------------------------------------------------------------------

    def _reduction(self, step: Step, layout: ImageLayout, points: tuple[int, ...]) -> Reduction:
        """A reducer at work in a step whose images are known."""
        assert self.config.reducer is not None and step.index is not None
        index, images = step.index[:, 0], self._sequence.images_at(step.index)
        assert images is not None
        order = step.order
        return Reduction(
            self.config.reducer,
            points,
            layout if order is None else layout.aligned(order),
            index=index,
            valid=step.valid,
            is_image=images[:, 0],
            order=order,
        )

    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a decoder layer where a reducer acts; called by the hooks on the layers."""
        if torch.compiler.is_compiling():
            return None
        self._calls.layer(layer)
        step = self._step
        if step is None or step.reduction is None or step.next_layer != layer or layer < step.reduction.points[0]:
            return None
        reduction = step.reduction
        if layer in reduction.points:
            with self._writable():
                hidden = reduction.reduce(layer, hidden)
                self._sequence.reduce(layer, _in_all_columns(reduction.into[layer], step, self._sequence.seen))
                step.index, step.valid = reduction.index.to(torch.int32).unsqueeze(1), reduction.valid
                step.row_new, step.order = np.asarray(reduction.row_tokens), None
        return _usable(hidden), reduction

    def renumber(self, layer: int, positions: dict[str, Any]) -> dict[str, Any]:
        """Positions that count a layer's own tokens, for reducers that have such; called by the hooks on the layers."""
        lost = self._lost_before(layer)
        if lost is None:
            return {}
        rotary = getattr(self._decoder(), "rotary_emb", None)
        return moved_back(positions, lost, getattr(rotary, "inv_freq", None))

    def _lost_before(self, layer: int) -> Tensor | None:
        """Tokens of each row that a layer never got in earlier steps, where its positions count its own alone.

        None where they do not, or nothing was lost; on the device, without waiting for it.
        """
        reducer, step, sequence = self.config.reducer, self._step, self._sequence
        if reducer is None or reducer.positions != "per_layer" or step is None or step.next_layer != layer:
            return None
        missing, earlier = sequence.missing(layer), sequence.seen - step.columns
        return None if missing is None or not earlier else missing[:, :earlier].sum(1)

    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, zero for tokens that a reducer took away; called by the hook on it."""
        reduction, self._reduced = self._reduced, None
        return None if reduction is None else reduction.spread(hidden)

    # -- transformers' contract ----------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new tokens of a layer; the attention function stores them.

        Raises:
            CacheStateError: if an earlier forward failed half-way, the cache belongs to another model, or the hooks did
                not see the call.
            UnsupportedModeError: if the model trains or its attention was switched away.
        """
        if not torch.compiler.is_compiling():
            if layer_idx == 0:
                self._check_decoder()
                self._check_ready()
            self._calls.check(layer_idx)
        if layer_idx >= len(self.layers):
            raise CacheStateError(f"layer {layer_idx}: the cache was made for a model of {len(self.layers)} layers")
        return attention.attach(key_states, self, layer_idx), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Columns seen; a tensor once decoding is compiled, when the host no longer counts along."""
        table = self._table
        if table is not None and (torch.compiler.is_compiling() or not table.exact):
            return table.columns
        return self._sequence.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks cover every column seen, whatever is kept; the offset marks them as a compressed cache's.

        `generate` asks before every step, compiled or not, which makes this the place for what the host has to do
        between compiled steps: to let buffers grow.
        """
        sequence = self._sequence
        if torch.compiler.is_compiling():
            return sequence.seen + query_length, attention.COMPRESSED
        if query_length == 1:
            self._prepare_step()
        unread = not sequence.seen or not sequence.row_seen.all()  # a prompt in chunks, of which some row had none yet
        return sequence.seen + query_length, attention.COMPRESSED_UNREAD if unread else attention.COMPRESSED

    @property
    def is_compileable(self) -> bool:
        """Whether decode steps can be compiled: not while the past is recorded, freed slots merged, or some packed."""
        merger = self.config.merger
        merges = merger is not None and merger.merges_decoding
        reducer = self.config.reducer
        renumbers = reducer is not None and reducer.positions == "per_layer"
        host = merges or renumbers or self.config.quantizer is not None or self._heads is not ALONE
        return not (self._recording or host)

    @property
    def batch_size(self) -> int:
        """Rows that the cache holds; -1 before the first forward."""
        return self._sequence.batch or -1

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Keys and values of each layer's slots in use, `[batch, kv_heads, slots, head_dim]`; None before any token.

        Slots are in no promised order, and what lies in those beyond a row's own means nothing; `report()` says which
        tokens are held.
        """
        self._catch_up_if_needed()
        return ((layer.keys, layer.values) for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in full precision; the model's before the first token."""
        return self._dtype() if self.is_initialized else self.decoder().dtype

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys and values are; the model's before the first token."""
        keys = self.layers[0].store.keys
        return self.decoder().device if keys is None else keys.device

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return all(layer.is_initialized for layer in self.layers)

    @property
    def is_croppable(self) -> bool:
        """Whether the last token can be taken back in every layer.

        To be asked in every process where several share the heads.
        """
        return self._recording or self._crop_refusal(1) is None

    def reset(self) -> None:
        """Forgets everything, also after a forward that failed."""
        self._step = Step(Phase.PREFILL)  # until everything is forgotten
        self._sequence = Sequence()
        for layer in self.layers:
            layer.forget(self._sequence)
        self._calls.crop(0)
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search.

        Args:
            beam_idx: row that each row becomes, integers `[rows]`.

        Raises:
            CacheStateError: if there is no such row; nothing has changed then.
        """
        self._select_rows("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row so many times, at least once.

        Raises:
            CacheStateError: if no row would be left; nothing has changed then.
        """
        rows = torch.arange(self._sequence.batch)
        self._select_rows("batch_repeat_interleave", rows.repeat_interleave(max(0, repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows.

        Args:
            indices: the rows, integers `[rows]` or bool `[batch]`.

        Raises:
            CacheStateError: if there is no such row, or none would be left; nothing has changed then.
        """
        if indices.dtype == torch.bool and indices.shape == (self._sequence.batch,):
            indices = indices.nonzero().flatten()
        self._select_rows("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, then lets the evictions that waited happen.

        Args:
            tokens_to_remove: zero or minus the number of tokens, as in transformers.

        Raises:
            CacheStateError: if one of them was evicted already (see `is_croppable`); nothing has changed then.
        """
        if tokens_to_remove > 0:
            raise CacheStateError(
                f"crop: takes minus the number of tokens to remove, as transformers does; got {tokens_to_remove}"
            )
        self._check_ready()
        self._catch_up_if_needed()
        sequence, columns = self._sequence, -tokens_to_remove
        if columns > sequence.seen:
            raise CacheStateError(f"crop: cannot remove {columns} tokens, only {sequence.seen} were seen")
        if columns and columns != sequence.seen and (refusal := self._crop_refusal(columns)):
            raise CacheStateError(refusal)
        if columns and columns == sequence.seen:
            self.reset()
        elif columns or self._waiting is not None:
            recorded = self._recorded_columns()
            with self._changing() as step:
                self._tidy()
                if columns:
                    if columns < recorded:
                        self._settle(step, columns)
                    gone = sequence.tokens_after(sequence.seen - columns)
                    for layer in self.layers:
                        layer.drop_from(sequence.row_seen - gone)
                    sequence.crop(sequence.seen - columns, gone, whole_step=0 < recorded <= columns)
                    if recorded and recorded <= columns:
                        self._drop_unscored()
                    self._calls.crop(sequence.seen)
                self._let_go(step)

    def _recorded_columns(self) -> int:
        """Columns of the last step, if it may be undone and has not scored yet."""
        unscored = self.layers[0].unscored
        return 0 if unscored is None or self._waiting is not Phase.PREFILL else unscored.query.shape[2]

    def _settle(self, step: Step, gone: int) -> None:
        """Lets the last step score, if it has not, by all its columns but the last so many."""
        sequence = self._sequence
        of_rows = sequence.tokens_after(sequence.seen - gone)
        step.row_seen = sequence.row_seen - of_rows
        for layer in self.layers:
            layer.settle(step, of_rows)

    def _drop_unscored(self) -> None:
        for layer in self.layers:
            layer.unscored = None

    def _crop_refusal(self, columns: int) -> str | None:
        """Why the last columns cannot be taken back; None if they can."""
        if not self._can_drop(columns):
            return (
                f"crop: some layer has already evicted one of the last {columns} tokens, so it cannot go back; call "
                "activate_past_recording() before a forward that may be undone, or take copy.deepcopy(cache) before it"
            )
        scorer, sequence, recorded = self.config.scorer, self._sequence, self._recorded_columns()
        scores = any(layer.scores is not None or layer.statistics for layer in self.layers)
        independent = scorer is not None and scorer.independent and not self.config.allocator.needs
        if self.config.evictor is None or not scores or independent or columns < recorded:
            return None
        left = sequence.row_seen - sequence.tokens_after(sequence.seen - columns)
        if (left < sequence.scored_end(before_last_step=recorded > 0)).any():
            return (
                f"crop: the last {columns} tokens include some whose queries scored older tokens, which cannot be "
                "taken back; call activate_past_recording() before a forward that may be undone, or take "
                "copy.deepcopy(cache) before it"
            )
        return None

    def activate_past_recording(self) -> None:
        """Lets eviction wait for `crop` after each forward, as assisted decoding needs it."""
        self._recording = True

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether eviction waits for `crop`."""
        return self._recording

    def before_forward(
        self, inputs: dict[str, Any], is_image: Tensor | None, layout: Callable[[], ImageLayout | None]
    ) -> None:
        """Looks at the inputs of a forward before it runs; called by the hook on the model.

        Raises:
            UnsupportedModeError: for labels, masks that are not two-dimensional, right padding in `generate`, and an
                image to be reduced while the past is recorded.
            UnsupportedModelError: if the places of image tokens in their images cannot be known, which a reducer needs.
            CacheStateError: for an attention mask that does not cover what was seen.
        """
        if torch.compiler.is_compiling():  # a decode step
            return
        self._catch_up_if_needed()
        self._calls.model(inputs, self._sequence.seen, self._recording)
        self._forget_images()
        if is_image is not None:
            if self.config.reducer is not None and bool(is_image.any()):
                if self._recording:
                    raise UnsupportedModeError(
                        "reducer: an image cannot be reduced in a forward that may be undone (assisted decoding), "
                        "since tokens that are not accepted would have a say; generate without an assistant and prompt "
                        "lookup, or read the image in a forward of its own before activate_past_recording()"
                    )
                self._layout = layout()
            self._sequence.mark_images(is_image)

    def before_decoder(self, decoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Looks at the decoder that is about to run and at its inputs; called by the hook on it.

        Raises:
            CacheStateError: if the cache was made for another model.
            UnsupportedModeError: if the decoder was called by itself where a policy has to know what is an image.
        """
        if torch.compiler.is_compiling():
            return
        own = self._decoder()
        if own is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        if own is not decoder:
            raise CacheStateError(
                f"cache: it was made for another model than this {type(decoder).__name__}; make a CompressedCache for "
                "each model, also for a copy of one"
            )
        self._catch_up_if_needed()
        if self._calls.decoder(inputs, self._sequence.seen):
            self._forget_images()
        shape = shape_of(inputs)
        batch = self._sequence.batch
        self._mask = None
        if shape is not None and batch in (0, shape[0]):  # else the first layer says so
            self._mask = self._read_mask(inputs.get("attention_mask"), shape[1])

    def before_turn(self, inputs: dict[str, Any]) -> None:
        """Looks at what `generate` was given, before it cuts off what was seen.

        Raises:
            CacheStateError: if the ids do not begin with what the cache has seen, or the mask does not cover it.
            UnsupportedModeError: for a row of padding alone.
        """
        self._catch_up_if_needed()
        self._calls.turn(inputs, self._sequence.seen)

    def _forget_images(self) -> None:
        """Drops what an earlier call said of images that never came."""
        self._layout, sequence = None, self._sequence
        if sequence.is_image is not None and sequence.is_image.shape[1] > sequence.seen:
            sequence.is_image = sequence.is_image[:, : sequence.seen]

    def after_turn(self) -> None:
        """Forgets what `generate` was about to read."""
        self._calls.due = None

    # -- kvcompress's own ----------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, rather than at the next crop or forward.

        To be called in every process where several share the heads.
        """
        self._check_ready()
        if self._waiting is not None:
            with self._changing() as step:
                self._tidy()
                self._let_go(step)

    def _let_go(self, step: Step) -> None:
        """Lets the eviction that waited happen, if any did, and makes the table for what is left."""
        waiting, evictor = self._waiting, self.config.evictor
        step.row_seen = self._sequence.row_seen
        self._settle(step, 0)
        if waiting is not None and evictor is None:
            for layer in self.layers:
                layer.close_ranks(room=0)
        elif waiting is Phase.PREFILL:
            self._compress_all(step)
        elif waiting is Phase.DECODE:
            self._evict_waiting()
        if waiting is not None:
            for layer in self.layers:
                layer.pack()
        step.problems.refuse()
        self._make_table()
        self._waiting = None

    @contextmanager
    def _changing(self, in_place: bool = False) -> Iterator[Step]:
        """A change of everything that the cache holds, which comes to its end or changes nothing.

        Args:
            in_place: whether tensors are changed where they are; then what fails leaves a cache that is broken until
                `reset`.
        """
        before = None if in_place else self._state()
        self._step = step = Step(Phase.PREFILL)
        try:
            with self._writable(), torch.no_grad():
                yield step
        except BaseException:
            if before is not None:
                for thing, attributes in before:
                    thing.__dict__.clear()
                    thing.__dict__.update(attributes)
            raise
        self._step = None

    def _state(self) -> list[tuple[Any, dict[str, Any]]]:
        """What the cache and its parts refer to, so that they can be made to do so again; the cache itself last."""
        parts: list[Any] = [self._sequence, self._calls, *self.layers, *(layer.store for layer in self.layers)]
        parts += [part for part in (self._table, self._allocation) if part is not None]
        return [(part, {name: _apart(value) for name, value in vars(part).items()}) for part in (*parts, self)]

    def _evict_waiting(self) -> None:
        """Lets the decode rule free as many slots as decode steps did not while the past was recorded."""
        evictor = self.config.evictor
        if evictor is None or evictor.frees == "nothing" or self._allocation is None:
            return
        table = self._make_table()
        limits = self._allocation.limits(self._rule, self._sequence.row_seen)
        while True:
            held = np.stack([layer.held for layer in self.layers])
            if (held <= limits).all():
                return
            table.free_now()
            if evictor.frees == "chosen":
                step = Step(Phase.DECODE, over=table.over())
                for layer in self.layers:
                    layer.free(step, table)
            table.learn_holes()
            if not table.hole.any():
                return
            for layer in self.layers:
                if self.config.merger is not None and self.config.merger.merges_decoding:
                    layer.merge_freed(table, in_place=False)
                layer.tidy(table)
            table = self._make_table()

    def report(self) -> CacheReport:
        """What the cache holds now, in tokens and bytes; waits for the device."""
        self._catch_up_if_needed()
        sequence, table, numbers = self._sequence, self._table, range(len(self.layers))
        held = np.stack([layer.held for layer in self.layers])
        if table is not None and table.steps:
            held = table.extent - table.hole + np.stack([layer.packed_rows for layer in self.layers])
        limits = self.limits()
        threshold = None if self._allocation is None else self._allocation.notes.get("threshold")
        slot_nbytes = sum(layer.store.slot_nbytes for layer in self.layers)
        return CacheReport(
            tokens_seen=sequence.seen,
            row_tokens_seen=sequence.row_seen.tolist(),
            layer_tokens=[sequence.given(number).tolist() for number in numbers],
            image_tokens=[sequence.images_given(number).tolist() for number in numbers],
            layer_lengths=held.tolist(),
            layer_budgets=None if limits is None else limits.tolist(),
            held_columns=[self._held_columns(layer) for layer in self.layers],
            kv_bytes=sum(layer.store.nbytes for layer in self.layers),
            index_bytes=self._index_nbytes(),
            full_kv_bytes=slot_nbytes * sequence.seen * sequence.batch,
            went_into={layers: into.tolist() for layers, into in sequence.went_into.items()},
            threshold=None if threshold is None else threshold.tolist(),
            notes=self._notes(),
        )

    def _index_nbytes(self) -> int:
        """Bytes allocated for what belongs to slots beside keys and values, those that layers share once."""
        tensors = [tensor for layer in self.layers for tensor in layer.index_tensors()]
        tensors += [] if self._table is None else self._table.tensors()
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _held_columns(self, layer: CompressedLayer) -> list[list[list[int]]]:
        """Columns of the tokens that a layer holds, ascending, per row and set."""
        if layer.index is None:
            return []
        columns = self._sequence.columns_of(self.index_of(layer)).tolist()
        return [[sorted(column for column in held if column >= 0) for held in row] for row in columns]

    def _notes(self) -> list[str]:
        evictor, notes = self.config.evictor, []
        if evictor is not None and evictor.frees == "nothing":
            notes.append("decode rule 'none': layers grow by every generated token, past their budget")
        if self._recording:
            notes.append("past recording: eviction waits for crop")
        return notes

    def limits(self) -> np.ndarray | None:
        """Slots that each layer may hold now, `[layers, batch]`; None if nothing is ever evicted while decoding."""
        evictor = self.config.evictor
        if evictor is None or evictor.frees == "nothing" or self._allocation is None:
            return None
        return self._allocation.limits(self._rule, self._sequence.row_seen)

    def ranked(self) -> list[Ranked]:
        """Token index and importance of every layer's slots, over all heads."""
        self._catch_up_if_needed()
        self._tidy()
        with self._writable(), torch.no_grad():
            self._settle(Step(Phase.PREFILL), 0)
        return [layer.ranked() for layer in self.layers]

    def allocation_at(self, config: CompressionConfig) -> Allocation:
        """What another configuration's allocator and budget would give the layers, from the scores that are there."""
        ranked = self.ranked()
        importance, context = gather_importance(self.layers, config, self._sequence, ranked)
        held, row_seen = np.stack([layer.held for layer in self.layers]), self._sequence.row_seen
        return allocate(
            config, Rule.of(config, len(self.layers)), row_seen, held, importance.device, importance, context
        )

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _select_rows(self, operation: str, index: Tensor) -> None:
        batch = before = self._sequence.batch
        self._check_ready()
        self._catch_up_if_needed()
        if not batch:
            return
        numbers = index.ndim == 1 and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        rows = index.cpu().numpy()
        if not numbers or not len(rows) or rows.min() < 0 or rows.max() >= batch:
            raise CacheStateError(
                f"{operation}: takes one or more of the rows 0 to {batch - 1} that the cache holds, as a vector of "
                f"integers; got {index.tolist()}"
            )
        index = index.long()
        with self._changing(in_place=True):
            if self._allocation is not None:
                self._allocation.select_rows(index, rows)
            self._sequence.select_rows(index, rows)
            for layer in self.layers:
                layer.select_rows(index, rows)
            if self._table is not None:
                self._table.select_rows(index, rows)
            self._calls.select_rows(index)
        if (
            len(rows) != before
            and self.config.budget.bytes is not None
            and self._allocation is not None
            and not self._recording
        ):  # bytes are shared by all rows, so each one's share has changed
            self._waiting = Phase.PREFILL
            self.compress()

    def _can_drop(self, columns: int) -> bool:
        """Whether every layer still holds all the tokens of the last columns."""
        wanted = self._sequence.tokens_after(self._sequence.seen - columns)
        first = self._sequence.row_seen - wanted
        return all((self._holds_from(layer, first) == wanted).all() for layer in self.layers)

    def _holds_from(self, layer: CompressedLayer, first: Counts) -> Counts:
        """Tokens per row, in the set that has fewest, from a token index on."""
        index = self.index_of(layer)
        held = (index >= torch.as_tensor(first, device=index.device)[:, None, None]).sum(-1)
        held = self._heads.gather(held) if layer.heads_part else held
        return held.amin(1).cpu().numpy()

    def index_of(self, layer: CompressedLayer) -> Tensor:
        """Token index of a layer's slots, wherever it is kept now; -1 where a slot is empty."""
        assert layer.index is not None
        table = self._table
        if table is None or not (table.steps or not table.exact):
            return layer.index
        index = table.index[layer.number]
        slots = torch.arange(index.shape[-1], device=index.device)
        index = index.masked_fill(slots == table.free[layer.number].unsqueeze(-1), -1)
        packed = layer.index[..., : layer.store.packed].to(index.device).expand(-1, index.shape[1], -1)
        return torch.cat([packed, index], 2)

    def _catch_up_if_needed(self) -> None:
        if self._table is not None and not self._table.exact:
            self._catch_up(self._table)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self._step is not None:
            raise self._broken()

    def _broken(self) -> CacheStateError:
        return CacheStateError(
            "cache: an earlier forward failed half-way, so its layers no longer agree; call reset() and run the prompt "
            "again"
        )

    def _check_decoder(self) -> None:
        decoder = self._decoder()
        if decoder is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
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
class _Weights:
    """Gives the weights of a layer, without keeping its model alive."""

    adapter: Adapter
    decoder: weakref.ReferenceType[PreTrainedModel]
    module: weakref.ReferenceType[nn.Module]

    def __call__(self) -> LayerWeights:
        decoder, module = self.decoder(), self.module()
        if decoder is None or module is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        return self.adapter.layer_weights(decoder, module)


def restore(model: PreTrainedModel) -> None:
    """Takes everything that kvcompress put on a model off again: its attention and its hooks.

    What caches of its parts brought along goes too, such as those of the language model inside a LLaVA. Caches made for
    the model before can no longer be used with it.
    """
    adapter = adapter_for(model)
    with hooks.changing:
        attention.uninstall(adapter.decoder(model), adapter.attention_modules(model))
        for module in model.modules():
            hooks.remove(module)


def _usable(tensor: Tensor) -> Tensor:
    """A tensor that the caller may use, also where it was made in an inference mode that the caller is not in."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()


def _in_all_columns(into: Tensor, step: Step, seen: int) -> Tensor:
    """What became of a step's columns, in the numbers of all columns seen; older ones are their own."""
    first = seen - into.shape[1]
    every = torch.arange(seen, device=into.device).repeat(len(into), 1)
    if step.first_order is not None:  # from columns with padding first to the model's
        into = torch.where(into < 0, -1, step.first_order.gather(1, into.clamp(min=0)))
        into = torch.empty_like(into).scatter_(1, step.first_order, into)
    every[:, first:] = torch.where(into < 0, -1, into + first)
    return every


def _apart(value: Any) -> Any:
    """A list or a mapping of its own, with the same things in it."""
    return copy.copy(value) if isinstance(value, list | dict) else value
