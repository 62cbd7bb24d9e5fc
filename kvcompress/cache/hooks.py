"""Hooks on a model, inert unless a forward comes with a compressed cache: one looks at inputs, some reduce tokens."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache import attention, mask_function, watching
from kvcompress.cache.argument import cache_among, under_installed_name
from kvcompress.cache.inputs import refuse_images
from kvcompress.cache.reduction import Reduction
from kvcompress.errors import UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.policies.images import ImageLayout

_HOOK = "_kvcompress_hook"  # on the model, its decoder and decoder layers
WHOLE_MASK = "_kvcompress_mask"  # among the arguments by name: the mask as it came, where `attention_mask` is padding
LAST_SEEN = (
    "_kvcompress_last_seen"  # likewise: the last new position that each sees, where some see more than came before
)
Forward: TypeAlias = Callable[..., Any]
# What stands in for a model's forward in the decode steps of the `generate` in progress, and which model's.
_stands_in: ContextVar[tuple[PreTrainedModel, Forward] | None] = ContextVar("stands_in", default=None)
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
    def after_decoder(self) -> None:
        """Hears that the decoder came to its end, where layers that are not compressed have to hear of it."""

    @abstractmethod
    def before_turn(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Gets a model and the arguments of `generate` by name, before it cuts off what it takes to be seen."""

    @abstractmethod
    def plan_decoding(self, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Forward | None]:
        """Gets the arguments of `generate` by name, and says how it is to decode.

        Returns:
            Arguments to add, and what is to stand in for the model's forward in decode steps; None for what
            transformers takes.
        """

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
    def spread_between(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What comes out of a layer before the last, likewise, where the model adds to it; None for itself."""

    @abstractmethod
    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, in the positions that went into the first; None if nothing was reduced."""


def observe(model: PreTrainedModel, decoder: PreTrainedModel, adapter: Adapter) -> None:
    """Puts hooks on a model and its decoder unless they are there; they are inert for every other cache."""
    if model is not decoder and not is_hooked(model):
        model.__dict__[_HOOK] = [model.register_forward_pre_hook(_ModelHook(model, adapter), with_kwargs=True)]
        if model.can_generate():
            model.__dict__.setdefault("generate", Generate(model))
            model.__dict__.setdefault("get_compiled_call", _CompiledCall(model))
    if not is_hooked(decoder):
        decoder.__dict__[_HOOK] = [decoder.register_forward_pre_hook(_DecoderHook(decoder), with_kwargs=True)]
        if adapter.own_layers(model):
            decoder.__dict__[_HOOK].append(decoder.register_forward_hook(_Done(decoder), with_kwargs=True))


def watch(attentions: list[nn.Module]) -> None:
    """Puts hooks on the attention of a vision tower's layers, unless they are there; they look where they are asked."""
    for attention_module in attentions:
        if not is_hooked(attention_module):
            attention_module.__dict__[_HOOK] = [
                attention_module.register_forward_pre_hook(watching.hook, with_kwargs=True)
            ]


def _refuse_class(cache: object) -> None:
    if isinstance(cache, type) and issubclass(cache, ObservesInputs):
        raise UnsupportedModeError(
            f"cache: got the class {cache.__name__} itself; make a cache of it for the model: {cache.__name__}(model)"
        )


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
        _refuse_class(cache)
        if isinstance(cache, ObservesInputs):
            given = inputs.get("attention_mask")
            inputs = {**inputs, "attention_mask": mask_function.padding_in(given), WHOLE_MASK: given}
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
        cache.before_decoder(module, {**inputs, LAST_SEEN: mask_function.last_seen_in(inputs[WHOLE_MASK])})


class _Done:
    """A hook that knows the names of a module's arguments, as `_Hook` does, and says that it came to its end."""

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_among({**dict(zip(self.names, args, strict=False)), **kwargs})
        if isinstance(cache, ObservesInputs):
            cache.after_decoder()


class _Instead:
    """A method of one model, which calls that of its class; holds the model by weak reference, so that it can go."""

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        functools.update_wrapper(self, getattr(type(model), self.name))  # type: ignore[arg-type]
        self.model = weakref.ref(model)

    def of_class(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's own method returns."""
        model = self.model()
        return getattr(type(model), self.name)(model, *args, **kwargs)

    def __reduce__(self) -> tuple[type[_Instead], tuple[PreTrainedModel | None]]:
        return type(self), (self.model(),)


class Generate(_Instead):
    """`generate`, with a look at what a turn begins with before it is cut, and a say in how it decodes."""

    name = "generate"

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates, as the class of the model does."""
        model, kwargs = self.model(), under_installed_name(kwargs)
        cache = cache_among(kwargs)
        _refuse_class(cache)
        if model is None or not isinstance(cache, ObservesInputs):
            return self.of_class(inputs, *args, **kwargs)
        given = dict(zip(("generation_config",), args, strict=False)) | kwargs
        given = given if inputs is None else {**given, "input_ids": inputs}
        cache.before_turn(model, given)
        try:
            more, forward = cache.plan_decoding(model, given)
            token = _stands_in.set(None if forward is None else (model, forward))
            try:
                return self.of_class(inputs, *args, **{**kwargs, **more})
            finally:
                _stands_in.reset(token)
        finally:
            cache.after_turn()


class _CompiledCall(_Instead):
    """`get_compiled_call`, which gives what a cache lets stand in for the model's forward."""

    name = "get_compiled_call"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        instead = _stands_in.get()
        if instead is not None and instead[0] is self.model():
            return instead[1]
        return self.of_class(*args, **kwargs)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module still has its hooks, which somebody may have cleared."""
    handles = module.__dict__.get(_HOOK)
    return handles is not None and all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)


def reduce_between(layers: list[nn.Module], whole: int = 0) -> None:
    """Puts hooks on decoder layers, unless they are there, that let caches reduce the tokens that go into each.

    A layer after a reduction gets the hidden states, position ids and rotary embeddings of the tokens that go on, and
    no mask, since the cache knows which are padding. The last layer's output has all positions again.

    Args:
        layers: the decoder layers.
        whole: number of first layers whose output has all positions too, since the model adds something to it.
    """
    between = layers[:-1][:whole]
    if all(map(is_hooked, layers)) and all(len(layer.__dict__[_HOOK]) > 1 for layer in between):
        return
    for index, layer in enumerate(layers):
        remove(layer)  # what a cache of the decoder alone put on, which knows of nothing that is added
        layer.__dict__[_HOOK] = [layer.register_forward_pre_hook(partial(_reduce, index), with_kwargs=True)]
    for index, layer in enumerate(between):
        layer.__dict__[_HOOK].append(layer.register_forward_hook(partial(_spread_between, index), with_kwargs=True))
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


def _spread_between(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = cache_among(kwargs)
    return cache.spread_between(index, output) if isinstance(cache, ReducesTokens) else None


def _spread(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = cache_among(kwargs)
    return cache.spread(output) if isinstance(cache, ReducesTokens) else None


def remove(module: nn.Module) -> None:
    """Takes the hooks off a model, a decoder or a layer."""
    for method in (Generate, _CompiledCall):
        if isinstance(module.__dict__.get(method.name), method):
            del module.__dict__[method.name]
    for handle in module.__dict__.pop(_HOOK, ()):
        handle.remove()
