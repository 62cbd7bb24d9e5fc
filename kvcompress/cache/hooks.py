"""Hooks on a model, inert unless a forward comes with a compressed cache: one looks at inputs, some reduce tokens."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache import attention
from kvcompress.cache.argument import cache_among, under_installed_name
from kvcompress.cache.inputs import refuse_images
from kvcompress.cache.reduction import Reduction
from kvcompress.integrations import Adapter
from kvcompress.policies.images import ImageLayout

_HOOK = "_kvcompress_hook"  # on the model, its decoder and decoder layers
# Held while the attention and the hooks of any model change, so that threads do not put them on twice.
changing = threading.RLock()


class ObservesInputs(ABC):
    """A cache that wants to see what a model and its decoder are called with."""

    @abstractmethod
    def before_forward(
        self, inputs: dict[str, Any], is_image: Tensor | None, layout: Callable[[], ImageLayout | None]
    ) -> None:
        """Gets the model's arguments by name.

        Args:
            inputs: the arguments.
            is_image: which input ids are images, if there are several ids and the model sees images.
            layout: finds out where in their images they belong.
        """

    @abstractmethod
    def before_decoder(self, decoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Gets the decoder that is about to run and its arguments by name."""

    @abstractmethod
    def before_turn(self, inputs: dict[str, Any]) -> None:
        """Gets the arguments of `generate` by name, before it cuts off what it takes to be seen."""

    @abstractmethod
    def after_turn(self) -> None:
        """Hears that `generate` has ended, or failed."""


class ReducesTokens(ABC):
    """A cache that lets fewer tokens go on from one decoder layer to the next."""

    @abstractmethod
    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a layer instead of these hidden states; None for themselves."""

    @abstractmethod
    def renumber(self, layer: int, positions: dict[str, Any]) -> dict[str, Any]:
        """Position ids and rotary embeddings that go into a layer instead of these; empty for themselves."""

    @abstractmethod
    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, in the columns that went into the first; None if nothing was reduced."""


def observe(model: PreTrainedModel, decoder: PreTrainedModel, adapter: Adapter) -> None:
    """Puts hooks on a model and its decoder unless they are there; they are inert for every other cache."""
    if model is not decoder and not is_hooked(model):
        model.__dict__[_HOOK] = [model.register_forward_pre_hook(_ModelHook(model, adapter), with_kwargs=True)]
        if model.can_generate():
            model.__dict__.setdefault("generate", Generate(model))
    if not is_hooked(decoder):
        decoder.__dict__[_HOOK] = [decoder.register_forward_pre_hook(_DecoderHook(decoder), with_kwargs=True)]


class _Hook:
    """A pre-hook that knows the names of a module's arguments; holds no reference to it, and can be pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        inputs = under_installed_name(kwargs)
        changed = None if inputs is kwargs else (args, inputs)
        if args:
            inputs = {**dict(zip(self.names, args, strict=False)), **inputs}
        cache = cache_among(inputs)
        if isinstance(cache, ObservesInputs):
            inputs = {**inputs, "attention_mask": attention.padding_in(inputs.get("attention_mask"))}
            if inputs.get("output_attentions") is None and getattr(module.config, "output_attentions", False):
                inputs = {**inputs, "output_attentions": True}
            self.look(module, inputs, cache)
        return changed

    def look(self, module: nn.Module, inputs: dict[str, Any], cache: ObservesInputs) -> None:
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        attention.register()  # a model that is read from a pickle may be the first of its process


class _ModelHook(_Hook):
    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        super().__init__(model)
        self.adapter = adapter

    def look(self, module: nn.Module, inputs: dict[str, Any], cache: ObservesInputs) -> None:
        if not self.adapter.sees_images:
            refuse_images(module, inputs)
        ids = inputs.get("input_ids")
        several = ids is not None and ids.shape[1] > 1
        is_image = self.adapter.image_tokens(module, ids) if several else None  # type: ignore[arg-type]
        layout = partial(self.adapter.image_layout, module, ids, inputs)  # type: ignore[arg-type]
        cache.before_forward(inputs, is_image, layout)


class _DecoderHook(_Hook):
    def look(self, module: nn.Module, inputs: dict[str, Any], cache: ObservesInputs) -> None:
        cache.before_decoder(module, inputs)


class Generate:
    """A model's `generate`, with a look at what a turn begins with before it is cut.

    It holds the model by weak reference, so that the model goes when nobody else holds it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        functools.update_wrapper(self, type(model).generate)  # type: ignore[attr-defined]
        self.model = weakref.ref(model)

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates, as the class of the model does."""
        model, kwargs = self.model(), under_installed_name(kwargs)
        cache = cache_among(kwargs)
        if isinstance(cache, ObservesInputs):
            cache.before_turn(kwargs if inputs is None else {**kwargs, "input_ids": inputs})
        try:
            return type(model).generate(model, inputs, *args, **kwargs)  # type: ignore[union-attr]

        finally:
            if isinstance(cache, ObservesInputs):
                cache.after_turn()

    def __reduce__(self) -> tuple[type[Generate], tuple[PreTrainedModel | None]]:
        return type(self), (self.model(),)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module still has its hooks, which somebody may have cleared."""
    handles = module.__dict__.get(_HOOK)
    return handles is not None and all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)


def reduce_between(layers: list[nn.Module]) -> None:
    """Puts hooks on decoder layers, unless they are there, that let caches reduce the tokens that go into each.

    A layer after a reduction gets the hidden states, position ids and rotary embeddings of the tokens that go on, and
    no mask, since the cache knows which are padding. The last layer's output has all columns again.
    """
    if all(map(is_hooked, layers)):
        return
    for index, layer in enumerate(layers):
        layer.__dict__[_HOOK] = [layer.register_forward_pre_hook(partial(_reduce, index), with_kwargs=True)]
    layers[-1].__dict__[_HOOK].append(layers[-1].register_forward_hook(_spread, with_kwargs=True))


def _reduce(
    index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = cache_among(kwargs)
    if not isinstance(cache, ReducesTokens):
        return None
    positions = {name: kwargs[name] for name in ("position_ids", "position_embeddings") if kwargs.get(name) is not None}
    found, hidden = cache.reduce(index, args[0]), args[0]
    changed: dict[str, Any] = {}
    if found is not None:
        hidden, reduction = found
        taken = reduction.of_the_tokens
        for name, given in positions.items():
            changed[name] = tuple(map(taken, given)) if isinstance(given, tuple) else taken(given)
        changed["attention_mask"] = None
    changed |= cache.renumber(index, positions | changed)
    return ((hidden, *args[1:]), {**kwargs, **changed}) if changed else None


def _spread(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = cache_among(kwargs)
    return cache.spread(output) if isinstance(cache, ReducesTokens) else None


def remove(module: nn.Module) -> None:
    """Takes the hooks off a model, a decoder or a layer."""
    if isinstance(module.__dict__.get("generate"), Generate):
        del module.__dict__["generate"]
    for handle in module.__dict__.pop(_HOOK, ()):
        handle.remove()
