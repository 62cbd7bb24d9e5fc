"""The cache object that `generate()` and plain forwards take as `cache`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcompress.cache import attention, hooks
from kvcompress.cache.calls import Calls
from kvcompress.cache.engine import Engine
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.report import CacheReport
from kvcompress.cache.reporting import report_on
from kvcompress.config import CompressionConfig
from kvcompress.config.profile import LayerProfile, check_profiles, profile_override
from kvcompress.errors import CacheStateError, UnsupportedModeError
from kvcompress.integrations import Adapter, adapter_for
from kvcompress.policies.images import ImageLayout


class CompressedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One decoder layer's part of a `CompressedCache`, in the shape transformers asks for."""

    is_sliding = False
    supports_early_init = False

    def __init__(
        self, engine: Engine, index: int, adapter: Adapter, decoder: weakref.ReferenceType[PreTrainedModel]
    ) -> None:
        self.engine = engine
        self.index = index
        self._adapter = adapter
        self._decoder = decoder

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds anything."""
        return self.engine.stores[self.index].keys is not None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last token can be taken back."""
        return self.engine.recording or self.engine.config.evictor is None or self.engine.can_drop(1)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the slots in use, `[batch, kv_heads, slots, head_dim]`."""
        return self.engine.stores[self.index].slots()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots in use."""
        return self.engine.stores[self.index].slots()[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring their buffers along."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens on to the attention function, which stores them and attends."""
        return attention.attach(key_states, self), value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attends over the stored slots and the new tokens."""
        decoder = self._decoder()
        assert decoder is not None
        weights = partial(self._adapter.layer_weights, decoder, module)
        with self.engine.writable():
            output = self.engine.attend(self.index, query, key, value, mask, scaling, weights)
        return _usable(output)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover every column seen, whatever is kept."""
        return self.engine.sequence.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, so that rotary positions go on after eviction."""
        return self.engine.sequence.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        """Moves the layer's buffers to CPU memory."""
        self.engine.stores[self.index].to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Brings the layer's buffers back to their device."""
        store = self.engine.stores[self.index]
        if store.device is not None:
            store.to(store.device)


class CompressedCache(Cache, hooks.ObservesInputs, hooks.ReducesTokens):
    """A key-value cache that stays within a budget; pass it to a model as `cache`.

    Releases of transformers before 5.24 call that argument `past_key_values`.

    Args:
        model: the model that will use it; its decoder gets the attention "kvcompress", which behaves as before with
            any other cache (`kvcompress.restore(model)` takes it off again).
        config: a preset's name, a `CompressionConfig`, a dict, or the path of a .yaml or .json file.
        profile: a `LayerProfile` or its file, in place of the allocator.
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

    def __init__(
        self,
        model: PreTrainedModel,
        config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "prefixkv",
        *,
        profile: LayerProfile | str | PathLike[str] | None = None,
        **overrides: Any,
    ) -> None:
        self.config = CompressionConfig.read(config, **profile_override(profile, overrides))
        adapter = adapter_for(model)
        check_profiles(self.config, adapter.decoder(model))
        layers = len(adapter.layers(model))
        if self.config.reducer is not None:
            self.config.reducer.acts_after(layers)  # complains before anything is touched
        self._engine = Engine(self.config, layers, adapter.head_group(model))
        decoder = adapter.decoder(model)
        self._decoder = weakref.ref(decoder)
        # A bare decoder may be part of a model that sees images, which its adapter cannot know.
        may_see_images = adapter.sees_images or decoder is model
        reduces = self.config.reducer is not None
        self._calls = Calls(reduces or (may_see_images and self.config.reads_modality), adapter.sees_images, reduces)
        super().__init__(
            layers=[CompressedLayer(self._engine, index, adapter, self._decoder) for index in range(layers)]
        )
        attention.install(decoder, adapter.attention_modules(model))
        hooks.observe(model, decoder, adapter)
        if self.config.reducer is not None:
            hooks.reduce_between(adapter.layers(model))

    def __repr__(self) -> str:
        return f"CompressedCache({self.config!r}, seen={self.get_seq_length()})"

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
            "copy.deepcopy(cache); for another one, write cache.config.dump(path), make a CompressedCache(model, path) "
            "there and run the prompt again"
        )

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
        if layer_idx == 0:
            self._check_decoder()
            self._engine.check_ready()
        self._calls.check(layer_idx)
        if layer_idx >= len(self.layers):
            raise CacheStateError(f"layer {layer_idx}: the cache was made for a model of {len(self.layers)} layers")
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[union-attr]

    @property
    def batch_size(self) -> int:
        """Rows that the cache holds; -1 before the first forward."""
        return self._engine.sequence.batch or -1

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return all(store.keys is not None for store in self._engine.stores)

    @property
    def is_croppable(self) -> bool:
        """Whether the last token can be taken back in every layer.

        To be asked in every process where several share the heads.
        """
        return all(layer.is_croppable for layer in self.layers)

    def reset(self) -> None:
        """Forgets everything, also after a forward that failed."""
        self._engine.reset()
        self._calls.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        rows = torch.arange(self._engine.sequence.batch)
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        rows = torch.arange(self._engine.sequence.batch)
        self._select_rows(rows[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back.

        Args:
            tokens_to_remove: zero or minus the number of tokens, as in transformers.

        Raises:
            CacheStateError: if one of them was evicted already (see `is_croppable`); nothing has changed then.
        """
        if tokens_to_remove > 0:
            raise CacheStateError(
                f"crop: takes minus the number of tokens to remove, as transformers does; got {tokens_to_remove}"
            )
        with self._engine.writable():
            self._engine.crop(-tokens_to_remove)
        self._calls.crop(self.get_seq_length())

    def activate_past_recording(self) -> None:
        """Lets eviction wait for `crop` after each forward, as assisted decoding needs it."""
        self._engine.recording = True

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether eviction waits for `crop`."""
        return self._engine.recording

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
        engine = self._engine
        self._calls.model(inputs, self.get_seq_length(), engine.recording)
        self._forget_images()
        if is_image is not None:
            if self.config.reducer is not None and bool(is_image.any()):
                if engine.recording:
                    raise UnsupportedModeError(
                        "reducer: an image cannot be reduced in a forward that may be undone (assisted decoding), "
                        "since tokens that are not accepted would have a say; generate without an assistant and prompt "
                        "lookup, or read the image in a forward of its own before activate_past_recording()"
                    )
                engine.layout = layout()
            engine.sequence.mark_images(is_image)

    def before_decoder(self, decoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Looks at the decoder that is about to run and at its inputs; called by the hook on it.

        Raises:
            CacheStateError: if the cache was made for another model.
            UnsupportedModeError: if the decoder was called by itself where a policy has to know what is an image.
        """
        own = self._decoder()
        if own is None:
            raise CacheStateError("cache: the model it was made for no longer exists; make a new cache for this one")
        if own is not decoder:
            raise CacheStateError(
                f"cache: it was made for another model than this {type(decoder).__name__}; make a CompressedCache for "
                "each model, also for a copy of one"
            )
        if self._calls.decoder(inputs, self.get_seq_length()):
            self._forget_images()

    def before_turn(self, inputs: dict[str, Any]) -> None:
        """Looks at what `generate` was given, before it cuts off what was seen.

        Raises:
            CacheStateError: if the ids do not begin with what the cache has seen, or the mask does not cover it.
            UnsupportedModeError: for a row of padding alone.
        """
        self._calls.turn(inputs, self.get_seq_length())

    def after_turn(self) -> None:
        """Forgets what `generate` was about to read."""
        self._calls.due = None

    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a decoder layer where a reducer acts; called by the hooks on the layers."""
        self._calls.layer(layer)
        with self._engine.writable():
            found = self._engine.reduce(layer, hidden)
        return None if found is None else (_usable(found[0]), found[1])

    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, zero for tokens that a reducer took away; called by the hook on it."""
        return self._engine.spread(hidden)

    # -- kvcompress's own ----------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, rather than at the next crop or forward.

        To be called in every process where several share the heads.
        """
        with self._engine.writable():
            self._engine.compress()

    def report(self) -> CacheReport:
        """What the cache holds now, in tokens and bytes; waits for the device once."""
        return report_on(self._engine)

    def _select_rows(self, index: Tensor) -> None:
        with self._engine.writable():
            self._engine.select_rows(index)
        self._calls.select_rows(index)

    def _forget_images(self) -> None:
        """Drops what an earlier call said of images that never came."""
        self._engine.layout, sequence = None, self._engine.sequence
        if sequence.is_image is not None and sequence.is_image.shape[1] > sequence.seen:
            sequence.is_image = sequence.is_image[:, : sequence.seen]

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


def restore(model: PreTrainedModel) -> None:
    """Takes everything that kvcompress put on a model off again: its attention and its hooks.

    Caches made for the model before can no longer be used with it.
    """
    adapter = adapter_for(model)
    attention.uninstall(adapter.decoder(model), adapter.attention_modules(model))
    for module in (model, adapter.decoder(model), *adapter.layers(model)):
        hooks.remove(module)


def _usable(tensor: Tensor) -> Tensor:
    """A tensor that the caller may use, also where it was made in an inference mode that the caller is not in."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
