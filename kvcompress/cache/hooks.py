"""Hooks on a model, inert unless a forward comes with a compressed cache: one looks at inputs, some reduce tokens."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache.argument import cache_among, under_installed_name
from kvcompress.cache.reduction import Reduction
from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import Adapter
from kvcompress.policies.images import ImageLayout

_HOOK = "_kvcompress_hook"  # on the model and on decoder layers


class ObservesInputs(ABC):
    """A cache that wants to see a model's inputs."""

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


class ReducesTokens(ABC):
    """A cache that lets fewer tokens go on from one decoder layer to the next."""

    @abstractmethod
    def reduce(self, layer: int, hidden: Tensor) -> tuple[Tensor, Reduction] | None:
        """What goes into a layer instead of these hidden states; None for themselves."""

    @abstractmethod
    def spread(self, hidden: Tensor) -> Tensor | None:
        """What comes out of the last layer, in the columns that went into the first; None if nothing was reduced."""


def observe(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the hook on a model unless it is there; it is inert for every other cache."""
    if _HOOK in model.__dict__:
        return
    names = tuple(inspect.signature(model.forward).parameters)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs = under_installed_name(kwargs)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = cache_among(inputs)
        if isinstance(cache, ObservesInputs):
            if inputs.get("pixel_values") is not None and not adapter.sees_images:
                kind = type(module).__name__
                raise UnsupportedModelError(f"pixel_values: {kind} is a text model; an image needs a LLaVA model")
            ids = inputs.get("input_ids")
            several = ids is not None and ids.shape[1] > 1
            is_image = adapter.image_tokens(module, ids) if several else None  # type: ignore[arg-type]
            layout = partial(adapter.image_layout, module, ids, inputs)  # type: ignore[arg-type]
            cache.before_forward(inputs, is_image, layout)
        return args, kwargs

    model.__dict__[_HOOK] = [model.register_forward_pre_hook(look, with_kwargs=True)]


def reduce_between(layers: list[nn.Module]) -> None:
    """Puts hooks on decoder layers, unless they are there, that let caches reduce the tokens that go into each.

    A layer after a reduction gets the hidden states, position ids and rotary embeddings of the tokens that go on, and
    no mask, since the cache knows which are padding. The last layer's output has all columns again.
    """
    if _HOOK in layers[0].__dict__:
        return
    for index, layer in enumerate(layers):
        layer.__dict__[_HOOK] = [layer.register_forward_pre_hook(partial(_reduce, index), with_kwargs=True)]
    layers[-1].__dict__[_HOOK].append(layers[-1].register_forward_hook(_spread, with_kwargs=True))


def _reduce(
    index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = cache_among(kwargs)
    found = cache.reduce(index, args[0]) if isinstance(cache, ReducesTokens) else None
    if found is None:
        return None
    hidden, reduction = found
    changed = {**kwargs, "attention_mask": None}
    for name in ("position_ids", "position_embeddings"):
        given = kwargs.get(name)
        if isinstance(given, tuple):
            changed[name] = tuple(map(reduction.of_the_tokens, given))
        elif given is not None:
            changed[name] = reduction.of_the_tokens(given)
    return (hidden, *args[1:]), changed


def _spread(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = cache_among(kwargs)
    return cache.spread(output) if isinstance(cache, ReducesTokens) else None


def remove(module: nn.Module) -> None:
    """Takes the hooks off a model or a layer."""
    for handle in module.__dict__.pop(_HOOK, ()):
        handle.remove()


def check_inputs(inputs: dict[str, Any], seen: int) -> None:
    """Refuses what a compressed cache cannot serve, before anything ran.

    Args:
        inputs: the model's arguments by name.
        seen: columns that the cache has seen.

    Raises:
        UnsupportedModeError: for labels, masks that are not two-dimensional, and right padding in `generate`.
        CacheStateError: for an attention mask that does not cover what was seen.
    """
    if inputs.get("labels") is not None:
        raise UnsupportedModeError(
            "labels: a loss over a sequence whose cache is compressed on the way means little; leave labels out and "
            "compute the loss from the logits"
        )
    mask = inputs.get("attention_mask")
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if mask is None or tokens is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedModeError("attention_mask: must be [batch, columns] with 1 for tokens and 0 for padding")
    new = tokens.shape[1]
    if mask.shape[1] < seen + new:
        raise CacheStateError(too_short(seen, new))
    keep = inputs.get("logits_to_keep")
    last_logits_only = isinstance(keep, int) and keep == 1  # what generate() asks for
    if last_logits_only and new > 1 and not bool(mask[:, -1].all()):
        raise UnsupportedModeError(
            "attention_mask: a row ends in padding, so the logits of its last column mean nothing; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )


def too_short(seen: int, new: int) -> str:
    """What is wrong with a turn that does not carry the whole conversation."""
    return (
        f"input: the cache has seen {seen} tokens, and with the {new} new ones attention_mask must cover {seen + new}; "
        "pass the ids and the mask of the whole conversation, or call reset() for a new one"
    )
