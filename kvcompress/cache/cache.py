"""The cache object that `generate()` and plain forwards take as `cache`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from kvcompress.cache import attention, choosing, hooks, loading, prefill, saving, tables, undoing
from kvcompress.cache.allocation import Allocation
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.axes import check_axes
from kvcompress.cache.cache_contract import CacheContract
from kvcompress.cache.calls import Calls
from kvcompress.cache.forwards import Forwards
from kvcompress.cache.own import OwnLayers
from kvcompress.cache.ranking import Ranked
from kvcompress.cache.reconstruction import check_reconstruction, reconstruct
from kvcompress.cache.report import CacheReport, report_on
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Prefill
from kvcompress.config import CompressionConfig
from kvcompress.config.profile import LayerProfile, check_made_for, profile_override
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError, UnsupportedModelError, shown
from kvcompress.integrations import adapter_for
from kvcompress.integrations.shape import ranges
from kvcompress.integrations.wrapped import unwrapped
from kvcompress.policies.base import Reducer
from kvcompress.policies.faults import policy_errors


class CompressedCache(Forwards, CacheContract):
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
        window: positions up to which a model is served all of whose layers slide; None for all others.

    Raises:
        ConfigError: if the configuration is wrong, or an allocator, such as a profile, was made for another model; the
            model is untouched then.
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
        decoder, layers = adapter.decoder(model), adapter.layers(model)
        check_made_for(asked, decoder, len(numbers))
        check_axes(asked, adapter, model)
        reduces = asked.reducer is not None
        if asked.reducer is not None:
            _check_reducer(asked.reducer, len(layers), own, model)
        reads_tower = asked.reducer is not None and asked.reducer.reads_tower and adapter.sees_images
        tower = adapter.tower_attentions(model) if reads_tower else []
        # A bare decoder may be part of a model that sees images, which its adapter cannot know.
        may_see_images = adapter.sees_images or decoder is model
        calls = Calls(reduces or (may_see_images and asked.reads_modality), adapter.sees_images, reduces)
        _check_reserve(reserve)
        state = CacheState(asked, numbers, adapter.head_group(model), calls, reserve, own)
        Forwards.__init__(self, state, adapter, model, decoding)
        every = own.layers | dict(zip(numbers, state.layers, strict=True))
        Cache.__init__(self, layers=[every[number] for number in range(len(layers))])
        with hooks.changing:
            if not attention.is_installed(decoder):
                attention.install(decoder, adapter.attention_modules(model))
            hooks.observe(model, decoder, adapter)
            hooks.watch(tower)
            if reduces:
                hooks.reduce_between(layers, adapter.adds_after(model))

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
            extra: what else to keep with it: text, finite numbers, tensors, lists and mappings, at most 16 inside each
                other (`loading.Saved.extra`).

        Raises:
            ConfigError: if the folder cannot be written, or holds a cache already, or a `cache.json` of somebody else;
                or a policy is not registered, or `extra` holds something else, so that it could not be read again.
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
        return cls.from_saved(model, loading.Saved.read(folder), reserve=reserve, decoding=decoding)

    @classmethod
    def from_saved(cls, model: nn.Module, saved: loading.Saved, **options: Any) -> CompressedCache:
        """The second half of `load`: a cache from what was read."""
        cache = cls(model, saved.config, **options)
        saved.fill(cache._state, cache.decoder())
        if cache._state.cut is not None:
            cache.know_weights()
        return cache

    # -- what it holds -------------------------------------------------------------------------------------------------

    def report(self) -> CacheReport:
        """What the cache holds now, in tokens and bytes; waits for the device."""
        return report_on(self._state)

    def limits(self) -> np.ndarray | None:
        """Slots that each layer, or head, may hold now, `[layers, batch, sets]`; None if decoding evicts nothing."""
        return self._state.limits()

    @property
    def counts_padding(self) -> bool:
        """Whether padding between tokens changes what is read: in layers that keep a window or a state of their own."""
        return bool(self._state.own)

    def ranked(self) -> list[Ranked]:
        """Token index and importance of every layer's slots, over all heads.

        Raises:
            CacheStateError: if nothing was read yet.
        """
        with self._scored():
            return [layer.ranked() for layer in self._state.layers]

    def allocation_at(self, config: CompressionConfig) -> Allocation:
        """What another configuration's allocator and budget would give the layers, from the scores that are there.

        Args:
            config: its allocator and budget count, and what its scorer protects; all else is as in this cache.

        Raises:
            ConfigError: if its allocator reads statistics, or importance, that this cache did not take.
            CacheStateError: if nothing was read yet.
        """
        with self._scored():
            prefill.check_allocation_at(self._state, config)
            return prefill.allocation_at(self._state, config, [layer.ranked() for layer in self._state.layers])

    @contextmanager
    def _scored(self) -> Iterator[None]:
        """Every forward has had its say within; what may be undone has not had it for good."""
        state = self._state
        if not state.sequence.batch:
            raise CacheStateError("cache: holds nothing yet that could be ranked; read a prompt first")
        tables.catch_up_if_needed(state)
        with state.undone(), state.writable(), torch.no_grad():
            tables.tidy(state)
            undoing.settle(state, Prefill(), 0)
            yield

    # -- changes -------------------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Brings every layer down to its budget now, rather than at the next crop or forward.

        To be called in every process where several share the heads.
        """
        undoing.compress(self._state)

    def choose_for_questions(self, inputs: Mapping[str, Any]) -> None:
        """Lets `auto` choose for a prompt that is about to be read, and asked about only later, as a `Document` is.

        It takes `kvzip`, with which `score_by_reconstruction` then reads the prompt, unless a scorer was set, the
        prompt is short or the model cannot repeat it. Changes nothing for another configuration.

        Args:
            inputs: what the model is about to be called with.
        """
        choosing.for_document(self._state, self.model(), self._adapter, dict(inputs))

    def score_by_reconstruction(self, tokenizer: Any, inputs: Mapping[str, Any], *, chunk: int = 512) -> None:
        """Reads a prompt, asks the model to repeat it, and keeps what that looks at: compression without a question.

        For the scorer `kvzip`, and many questions on one document: ask them of copies (`copy.deepcopy(cache)`). The
        prompt is held whole until it is scored; the repetition is taken back. Each token is scored by the repetition of
        its own part, which attends to the whole prompt and to itself.

        Source: KVzip (arXiv 2505.23416, section 3; its released code for the words of the request).

        Args:
            tokenizer: the model's, for the request; its chat template, if it has one, tells how an answer begins.
            inputs: what the model is called with: `input_ids` `[batch, tokens]`, `attention_mask` where rows have
                padding, and what images need. A prompt with images is repeated as a whole.
            chunk: tokens of a part, which is repeated at a time; small ones cost less attention, and a request each.

        Raises:
            ConfigError: if the scorer is not made for it, the inputs hold no ids, or a mask of another shape or without
                a token, or the tokenizer or `chunk` is none.
            CacheStateError: if the cache has seen tokens already. What fails later leaves an empty cache.
        """
        model = self.model()
        check_reconstruction(self._state, tokenizer, inputs, chunk)
        try:
            with torch.no_grad():
                forward = partial(model, **cache_argument(self))
                reconstruct(self._state, model, forward, tokenizer, inputs, chunk)
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Forgets everything, also after a forward that failed."""
        self._state.forget()
        self.forget_forward()


def _check_reserve(reserve: object) -> None:
    if not isinstance(reserve, int) or isinstance(reserve, bool) or reserve < 0:
        raise ConfigError(f"reserve: must be a number of tokens (int), 0 or more; got {shown(reserve)}")


def _check_reducer(reducer: Reducer, layers: int, own: OwnLayers, model: nn.Module) -> None:
    """Complains of what cannot be reduced before anything is touched."""
    if own:
        raise UnsupportedModelError(
            f"reducer: layers {ranges(sorted(own.layers))} of {type(model).__name__} slide or sum up, and count "
            "every token that comes; let the reducer be None, or choose a model all of whose layers attend to "
            "everything"
        )
    with policy_errors(reducer):
        reducer.acts_after(layers)


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
