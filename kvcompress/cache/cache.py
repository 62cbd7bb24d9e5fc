"""The cache object that `generate()` and plain forwards take as `cache`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.cache import attention, choosing, decoding, hooks, prefill, rows, saving, undoing
from kvcompress.cache.allocation import Allocation
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.axes import check_axes, check_positions, give_offset, take_offset
from kvcompress.cache.calls import Calls
from kvcompress.cache.capture import GRAPHS, CapturedDecoding
from kvcompress.cache.inputs import check_types, check_window, shape_of, tokens_to_come
from kvcompress.cache.masks import Mask, read_mask
from kvcompress.cache.own import OwnLayers
from kvcompress.cache.reconstruction import reconstruct
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.renumbering import lost_before, moved_back
from kvcompress.cache.report import CacheReport, report_on
from kvcompress.cache.selection import Ranked
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Prefill
from kvcompress.config import CompressionConfig
from kvcompress.config.profile import LayerProfile, check_profiles, profile_override
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import Adapter, adapter_for
from kvcompress.integrations.shape import ranges
from kvcompress.integrations.wrapped import unwrapped
from kvcompress.parallel import ALONE
from kvcompress.policies.context import LayerWeights
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout

_COMPILED = (
    "torch.compile: a compiled forward reads one token of every row, after a prompt that was read without compilation; "
    "call generate, or read the prompt with the model inside (compiled._orig_mod). Where layers slide or sum up, "
    "none are compiled"
)
_WORTH_CAPTURING = 32  # tokens to come


class CompressedCache(Cache, hooks.ObservesInputs, hooks.ReducesTokens):
    """A key-value cache that stays within a budget; pass it to a model as `cache`.

    Releases of transformers before 5.24 call that argument `past_key_values`.

    Args:
        model: the model that will use it; its decoder gets the attention "kvcompress", which behaves as before with
            any other cache (`kvcompress.restore(model)` takes it off again). It may be wrapped by PEFT, `torch.compile`
            or DistributedDataParallel.
        config: a preset's name, a `CompressionConfig`, a dict, or the path of a .yaml or .json file; "auto" chooses
            by the first prompt, and the report says what and why.
        profile: a `LayerProfile` or its file, in place of the allocator.
        reserve: tokens that are about to be generated: buffers get room for so many at once where they grow, in place
            of a little at a time. To be given where decoding is compiled by hand; `generate` says it by itself.
        decoding: how `generate` decodes on a GPU: "captured" lets a CUDA graph replay the first steps, where some 32
            tokens or more are to come; "compiled" lets transformers generate code, which takes a minute at first;
            "eager" runs every step in Python. The report says which it was. On a CPU every step is eager. A
            `compile_config` or `disable_compile` that `generate` is given goes before it.
        **overrides: fields of the configuration to replace, for instance `budget=0.2`.

    Attributes:
        window: columns up to which a model is served all of whose layers slide; None for all others.

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

    def __init__(
        self,
        model: nn.Module,
        config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "auto",
        *,
        profile: LayerProfile | str | PathLike[str] | None = None,
        reserve: int = 0,
        decoding: str = "captured",
        **overrides: Any,
    ) -> None:
        asked = CompressionConfig.read(config, **profile_override(profile, overrides))
        model = unwrapped(model)
        adapter = adapter_for(model)
        numbers, own = adapter.compressed_layers(model), OwnLayers(adapter.own_layers(model))
        check_profiles(asked, adapter.decoder(model), len(numbers))
        check_axes(asked, adapter, model)
        layers = len(adapter.layers(model))
        if own and asked.reducer is not None:
            raise UnsupportedModelError(
                f"reducer: layers {ranges(sorted(own.layers))} of {type(model).__name__} slide or sum up, and count "
                "every token that comes; let the reducer be None, or choose a model all of whose layers attend to "
                "everything"
            )
        if asked.reducer is not None:
            with policy_errors(asked.reducer):
                asked.reducer.acts_after(layers)  # complains before anything is touched
        decoder = adapter.decoder(model)
        self._adapter, self._decoder, self._model = adapter, weakref.ref(decoder), weakref.ref(model)
        # A bare decoder may be part of a model that sees images, which its adapter cannot know.
        may_see_images, reduces = adapter.sees_images or decoder is model, asked.reducer is not None
        calls = Calls(reduces or (may_see_images and asked.reads_modality), adapter.sees_images, reduces)
        self._decoding, self.window = _known_decoding(decoding), adapter.window(model)
        self._state = CacheState(asked, numbers, adapter.head_group(model), calls, reserve, own)
        self._place = {number: place for place, number in enumerate(numbers)}  # of compressed layers among themselves
        self._layout: ImageLayout | None = None  # of the images of the forward about to begin
        self._in_turn = False  # of `generate`
        self._mask: Mask | None = None  # what the mask of the forward about to begin says, if anything
        every = own.layers | dict(zip(numbers, self._state.layers, strict=True))
        super().__init__(layers=[every[number] for number in range(layers)])
        with hooks.changing:
            attention.install(decoder, adapter.attention_modules(model))
            hooks.observe(model, decoder, adapter)
            if reduces:
                hooks.reduce_between(adapter.layers(model), adapter.adds_after(model))

    @property
    def config(self) -> CompressionConfig:
        """How it compresses: what was asked for, and from the first prompt on what `auto` chose for that."""
        return self._state.config

    def __repr__(self) -> str:
        return f"CompressedCache({self.config!r}, seen={self._state.sequence.seen})"

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

    def save(
        self, folder: str | PathLike[str], *, overwrite: bool = False, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes what the cache holds, to go on in another process: `cache.json` and a file of tensors (safetensors).

        The cache stays as it is. Another process sees the old cache or the new one, never a part of one.

        Args:
            folder: where to; made where it is missing.
            overwrite: whether a cache that was saved there is replaced.
            extra: what else to keep with it: text, numbers, tensors, lists and mappings (`saving.Saved.extra`).

        Raises:
            ConfigError: if the folder cannot be written, or holds a cache already, or a `cache.json` of somebody else;
                or a policy is not registered, so that it could not be read again.
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
        saving.save(self._state, self.decoder(), folder, overwrite=overwrite, extra=extra)

    @classmethod
    def load(
        cls, model: nn.Module, folder: str | PathLike[str], *, reserve: int = 0, decoding: str = "captured"
    ) -> CompressedCache:
        """Reads a cache that `save` wrote; decoding goes on to the bit as with the one that was saved.

        Nothing in the folder is run. Policies of your own must be registered before.

        Args:
            model: the model it was saved from, in the same dtype; in any process, on any device.
            folder: where it was saved.
            reserve: as for a new cache.
            decoding: as for a new cache.

        Raises:
            ConfigError: if the folder holds no cache, a damaged one, or one of another model or release.
            UnsupportedModelError: as for a new cache.
        """
        return cls.from_saved(model, saving.Saved.read(folder), reserve=reserve, decoding=decoding)

    @classmethod
    def from_saved(cls, model: nn.Module, saved: saving.Saved, **options: Any) -> CompressedCache:
        """The second half of `load`: a cache from what was read."""
        cache = cls(model, saved.config, **options)
        saved.fill(cache._state, cache.decoder())
        return cache

    def decoder(self) -> PreTrainedModel:
        """The module that owns the decoder layers.

        Raises:
            CacheStateError: if the model no longer exists.
        """
        decoder = self._decoder()
        if decoder is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        return decoder

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
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Takes a layer through the step in progress, which the first layer begins and the last ends."""
        state = self._state
        if torch.compiler.is_compiling():
            outside = self.window is not None and not self._in_turn  # where nobody counts
            if query.shape[2] > 1 or state.table is None or state.own or outside:
                raise UnsupportedModeError(_COMPILED)
        else:
            state.calls.attends(layer, module)
        layer = self._place[layer]
        if layer == 0 and not state.early:
            self._begin(query.shape[0], query.shape[2], query.device)
        step = state.step
        if isinstance(step, Prefill) and step.last_seen is None:
            attention.check_causal(module, mask, first=1 < step.columns == state.sequence.seen)
        if step is None or step.next_layer != layer:
            raise state.broken()
        with state.writable():
            weights = _Weights(self._adapter, self._decoder, weakref.ref(module))
            output = state.layers[layer].attend(step, state.table, query, key, value, scaling, weights, softcap, sinks)
            step.next_layer += 1
            if step.next_layer == len(state.layers):
                self._end()
        return _usable(output)

    def _begin(self, batch: int, queries: int, device: torch.device) -> None:
        """Makes the step of a forward, and takes note of its tokens."""
        state = self._state
        if decoding.host_is_left_out(state):  # in decode steps alone, after a prefill step that made the table
            decoding.begin(state)
            return
        state.check_ready(entered=True)
        if state.sequence.batch not in (0, batch):
            raise CacheStateError(
                f"batch: the cache holds {state.sequence.batch} rows, this forward has {batch}; call reset() for "
                "another batch, or batch_repeat_interleave / batch_select_indices to change the rows"
            )
        if state.waiting is not None:
            self._stop_recording()  # nobody cropped after the last forward, so nobody is rolling back
        (says, self._mask), (layout, self._layout) = (self._mask, None), (self._layout, None)
        if queries == 1 and state.sequence.seen and says is None:
            decoding.begin(state)
        else:
            says = says or Mask(None, None, np.full(batch, queries), None)
            prefill.begin(state, queries, device, says, layout)

    def _stop_recording(self) -> None:
        """Lets what waited for `crop` happen, which nobody calls any more."""
        self._state.recording = False
        undoing.compress(self._state, entered=True)
        self._state.own.record(False)

    def _end(self) -> None:
        """Brings every layer within its budget that is not yet, and forgets the step."""
        state = self._state
        step = state.step
        if isinstance(step, Prefill):
            prefill.end(state, step)
            state.step, state.reduced = None, step.reduction
        else:
            state.reduced = None
            decoding.end(state)

    # -- reducing ------------------------------------------------------------------------------------------------------

    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a decoder layer where a reducer acts; called by the hooks on the layers."""
        if torch.compiler.is_compiling():
            return None
        state = self._state
        state.calls.layer(layer)
        if layer == 0 and prefill.reduces_first(state) and not decoding.host_is_left_out(state):
            state.check_ready()
            if self._layout is not None:
                self._begin(hidden.shape[0], hidden.shape[1], hidden.device)
        found = prefill.reduce(state, layer, hidden)
        return None if found is None else (_usable(found[0]), found[1])

    def spread_between(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What comes out of a layer, in all columns, for a model that adds to it there; called by the hooks on layers.

        The tokens that go on are taken from it again before the next layer.
        """
        step = self._state.step
        reduction = step.reduction if isinstance(step, Prefill) else None
        if reduction is None or layer < reduction.points[0]:
            return None
        return reduction.spread_between(hidden)

    def renumber(self, layer: int, positions: dict[str, Any]) -> dict[str, Any]:
        """Positions that count a layer's own tokens, for reducers that have such; called by the hooks on the layers."""
        lost = lost_before(self._state, layer)
        if lost is None:
            return {}
        rotary = getattr(self._decoder(), "rotary_emb", None)
        return moved_back(positions, lost, getattr(rotary, "inv_freq", None))

    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, zero for tokens that a reducer took away; called by the hook on it."""
        reduction, self._state.reduced = self._state.reduced, None
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
        state, own = self._state, self._state.own.layers.get(layer_idx)
        if not torch.compiler.is_compiling():
            if layer_idx == state.own.first_updated:
                self._check_decoder()
                if not state.early:
                    state.check_ready(entered=True)
            state.calls.check(layer_idx - state.own.first_updated)
            state.calls.hands_over(None if own is not None else layer_idx)
        if layer_idx >= len(self.layers):
            raise CacheStateError(f"layer {layer_idx}: the cache was made for a model of {len(self.layers)} layers")
        if own is not None:
            found: tuple[Tensor, Tensor] = own.update(key_states, value_states, *args, **kwargs)
            return found
        return attention.attach(key_states, self, layer_idx), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Columns seen; a tensor once decoding is compiled, when the host no longer counts along."""
        table = self._state.table
        if table is not None and (decoding.host_is_left_out(self._state) or not table.exact):
            return table.columns
        return self._state.sequence.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks cover every column seen, whatever is kept; the offset marks them as a compressed cache's.

        `generate` asks before every step, compiled or not, which makes this the place for what the host has to do
        between compiled steps: to let buffers grow, and to quantize what has become old enough.
        """
        sequence = self._state.sequence
        if (own := self._state.own.layers.get(layer_idx)) is not None and hasattr(own, "get_mask_sizes"):
            sizes: tuple[int, int] = own.get_mask_sizes(query_length)
            return sizes
        if decoding.host_is_left_out(self._state):
            return query_length, attention.COMPRESSED  # no mask is made, and graphs depend on no number
        if query_length == 1:
            decoding.prepare_step(self._state)
        unread = not sequence.seen or not sequence.row_seen.all()  # a prompt in chunks, of which some row had none yet
        return sequence.seen + query_length, attention.COMPRESSED_UNREAD if unread else attention.COMPRESSED

    @property
    def is_compileable(self) -> bool:
        """Whether decode steps can be compiled: not while the past is recorded or freed slots are merged."""
        merger = self.config.merger
        merges = merger is not None and merger.merges_decoding
        reducer = self.config.reducer
        renumbers = reducer is not None and reducer.positions == "per_layer"
        host = merges or renumbers or self._state.heads is not ALONE or bool(self._state.own)
        return not (self._state.recording or host or self._adapter.typed)

    @property
    def batch_size(self) -> int:
        """Rows that the cache holds; -1 before the first forward."""
        return self._state.sequence.batch or -1

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Keys and values of each layer's slots in use, `[batch, kv_heads, slots, head_dim]`; None before any token.

        Slots are in no promised order, and what lies in those beyond a row's own means nothing; `report()` says which
        tokens are held.
        """
        decoding.catch_up_if_needed(self._state)
        return ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in full precision; the model's before the first token."""
        return self._state.dtype if self.is_initialized else self.decoder().dtype

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys and values are; the model's before the first token."""
        keys = self._state.layers[0].store.keys
        return self.decoder().device if keys is None else keys.device

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return all(layer.is_initialized for layer in self._state.layers)

    @property
    def is_croppable(self) -> bool:
        """Whether the last token can be taken back in every layer.

        To be asked in every process where several share the heads.
        """
        if self._state.recording:
            return self._state.own.goes_back
        return undoing.refusal(self._state, 1) is None

    def reset(self) -> None:
        """Forgets everything, also after a forward that failed."""
        self._state.forget()
        self._layout = self._mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search.

        Args:
            beam_idx: row that each row becomes, integers `[rows]`.

        Raises:
            CacheStateError: if there is no such row; nothing has changed then.
        """
        rows.select(self._state, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row so many times, at least once.

        Raises:
            CacheStateError: if no row would be left; nothing has changed then.
        """
        numbers = torch.arange(self._state.sequence.batch)
        rows.select(self._state, "batch_repeat_interleave", numbers.repeat_interleave(max(0, repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows.

        Args:
            indices: the rows, integers `[rows]` or bool `[batch]`.

        Raises:
            CacheStateError: if there is no such row, or none would be left; nothing has changed then.
        """
        if indices.dtype == torch.bool and indices.shape == (self._state.sequence.batch,):
            indices = indices.nonzero().flatten()
        rows.select(self._state, "batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, then lets the evictions that waited happen.

        Args:
            tokens_to_remove: zero or minus the number of tokens, as in transformers.

        Raises:
            CacheStateError: if one of them was evicted already (see `is_croppable`); nothing has changed then.
        """
        undoing.crop(self._state, tokens_to_remove)

    def score_by_reconstruction(self, tokenizer: Any, inputs: Mapping[str, Any], *, chunk: int = 2048) -> None:
        """Reads a prompt, asks the model to repeat it, and keeps what that looks at: compression without a question.

        For the scorer `kvzip`, and many questions on one document: ask them of copies (`copy.deepcopy(cache)`). The
        prompt is held whole until it is scored; the repetition is taken back.

        Source: KVzip (arXiv 2505.23416, section 3; its released code for the words of the request).

        Args:
            tokenizer: the model's, for the request; its chat template, if it has one, tells how an answer begins.
            inputs: what the model is called with: `input_ids` `[batch, tokens]`, `attention_mask` where rows have
                padding, and what images need. A prompt with images is repeated as a whole.
            chunk: tokens that are repeated at a time.

        Raises:
            ConfigError: if the scorer is not made for it, or the inputs hold no ids.
            CacheStateError: if the cache has seen tokens already. What fails later leaves an empty cache.
        """
        model = self._model()
        if model is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        try:
            with torch.no_grad():
                forward = partial(model, **cache_argument(self))
                reconstruct(self._state, model, forward, tokenizer, inputs, chunk)
        except BaseException:
            if self._state.recording:
                self.reset()
            raise

    def activate_past_recording(self) -> None:
        """Lets eviction wait for `crop` after each forward, as assisted decoding needs it."""
        self._state.recording = True
        self._state.own.record(True)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether eviction waits for `crop`."""
        return self._state.recording

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
        decoding.catch_up_if_needed(self._state)
        self._check_window(shape_of(inputs))
        if self._adapter.typed and self._adapter.reads_types(inputs):
            check_types(inputs, self._state.sequence.seen)
        self._state.calls.model(inputs, self._state.sequence.seen, self._state.recording)
        self._forget_images()
        if not self._in_turn:  # `generate` has seen to it
            check_positions(self._state.sequence, self._adapter, inputs)
            give_offset(self._state.sequence, self._adapter, self._model())
        if is_image is not None:
            if self.config.reducer is not None and bool(is_image.any()):
                if self._state.recording:
                    raise UnsupportedModeError(
                        "reducer: an image cannot be reduced in a forward that may be undone (assisted decoding), "
                        "since tokens that are not accepted would have a say; generate without an assistant and prompt "
                        "lookup, or read the image in a forward of its own before activate_past_recording()"
                    )
                self._layout = layout()
            self._state.sequence.mark_images(is_image)

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
        decoding.catch_up_if_needed(self._state)
        self._check_window(shape_of(inputs))
        if self._state.calls.decoder(inputs, self._state.sequence.seen):
            self._forget_images()
        shape = shape_of(inputs)
        batch = self._state.sequence.batch
        if shape is not None and shape[1] > 1:
            take_offset(self._state.sequence, self._adapter, self._model(), inputs)
        self._mask = None
        if shape is not None and batch in (0, shape[0]):  # else the first layer says so
            self._mask = read_mask(
                self._state.sequence, inputs.get("attention_mask"), shape, inputs.get(hooks.LAST_SEEN)
            )
            choosing.for_forward(self._state, shape[1], self._mask)
        if self._state.own:
            self._state.check_ready()
            self._state.own.unfinished = True

    def after_decoder(self) -> None:
        """Hears that the decoder came to its end; called by the hook on it."""
        self._state.own.unfinished = False

    def before_turn(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Looks at what `generate` was given, before it cuts off what was seen.

        Args:
            model: the model that generates.
            inputs: what `generate` was given.

        Raises:
            CacheStateError: if the ids do not begin with what the cache has seen, or the mask does not cover it.
            UnsupportedModeError: for a row of padding alone.
        """
        decoding.catch_up_if_needed(self._state)
        self._check_window(None, inputs)
        self._state.calls.turn(inputs, self._state.sequence.seen)
        give_offset(self._state.sequence, self._adapter, self._model())
        self._in_turn = True
        choosing.for_turn(self._state, model, self._adapter, inputs)

    def _forget_images(self) -> None:
        """Drops what an earlier call said of images that never came."""
        self._layout, sequence = None, self._state.sequence
        if sequence.is_image is not None and sequence.is_image.shape[1] > sequence.seen:
            sequence.is_image = sequence.is_image[:, : sequence.seen]

    def plan_decoding(
        self, model: PreTrainedModel, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], hooks.Forward | None]:
        """Says how `generate` is to decode: arguments to add, and what stands in for the model's forward, if anything.

        Args:
            model: the model that generates.
            inputs: what `generate` was given.
        """
        given = inputs.get("generation_config") or model.generation_config
        told = any(inputs.get(name, getattr(given, name, None)) for name in ("compile_config", "disable_compile"))
        if told or model.device.type not in GRAPHS or not self.is_compileable:
            return {}, None
        coming = tokens_to_come(model, inputs)
        if self._decoding == "eager" or (self._decoding == "captured" and coming < _WORTH_CAPTURING):
            return {"disable_compile": True}, None
        self._state.coming = coming
        return {}, CapturedDecoding(model, self._state) if self._decoding == "captured" else None

    def after_turn(self) -> None:
        """Forgets what `generate` was about to read and to generate."""
        self._state.calls.due, self._state.coming, self._state.whole_prompt = None, 0, None
        self._in_turn = False

    # -- kvcompress's own ----------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, rather than at the next crop or forward.

        To be called in every process where several share the heads.
        """
        undoing.compress(self._state)

    def report(self) -> CacheReport:
        """What the cache holds now, in tokens and bytes; waits for the device."""
        return report_on(self._state)

    def limits(self) -> np.ndarray | None:
        """Slots that each layer may hold now, `[layers, batch]`; None if nothing is ever evicted while decoding."""
        return self._state.limits()

    def ranked(self) -> list[Ranked]:
        """Token index and importance of every layer's slots, over all heads."""
        state = self._state
        decoding.catch_up_if_needed(state)
        decoding.tidy(state)
        with state.writable(), torch.no_grad():
            undoing.settle(state, Prefill(), 0)
        return [layer.ranked() for layer in state.layers]

    def allocation_at(self, config: CompressionConfig) -> Allocation:
        """What another configuration's allocator and budget would give the layers, from the scores that are there."""
        ranked = self.ranked()
        return prefill.allocation_at(self._state, config, ranked)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_window(self, shape: tuple[int, int] | None, turn: dict[str, Any] | None = None) -> None:
        """Refuses a forward of that shape, or a turn of `generate`, that goes beyond the window of every layer."""
        model, seen = self._model(), self._state.sequence.seen
        if self.window is None or model is None:
            return
        full = self._adapter.without_window(model)
        if turn is None:
            new = 0 if shape is None else shape[1]
            says = f"{seen} were seen, and {new} come. To attend to everything instead, {full}"
            check_window(self.window, seen + new, says)
            return
        mask, shape = turn.get("attention_mask"), shape_of(turn)
        read = max(0 if shape is None else shape[1], mask.shape[1] if isinstance(mask, Tensor) else 0)
        coming = max(1, tokens_to_come(model, turn))
        says = f"the prompt has {read} and {coming} are to come: lower max_new_tokens. To attend to everything, {full}"
        check_window(self.window, read + coming - 1, says)  # the last one is not read

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


def _known_decoding(decoding: str) -> str:
    if decoding not in ("captured", "compiled", "eager"):
        raise ConfigError(f"decoding: must be 'captured', 'compiled' or 'eager'; got {decoding!r}")
    return decoding


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


def restore(model: nn.Module) -> None:
    """Takes everything that kvcompress put on a model off again: its attention and its hooks.

    What caches of its parts brought along goes too, such as those of the language model inside a LLaVA. Caches made for
    the model before can no longer be used with it.
    """
    model = unwrapped(model)
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
