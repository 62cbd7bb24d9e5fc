"""One hook on a model, which looks at the inputs of forwards with a compressed cache and at nothing else."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import Adapter

_HOOK = "_kvcompress_hook"  # on the model


class ObservesInputs(ABC):
    """A cache that wants to see a model's inputs."""

    @abstractmethod
    def before_forward(self, inputs: dict[str, Any], is_image: Tensor | None) -> None:
        """Gets the model's arguments by name, and which input ids are images if there are several."""


def observe(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the hook on a model unless it is there; it is inert for every other cache."""
    if _HOOK in model.__dict__:
        return
    signature = inspect.signature(model.forward)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        cache = inputs.get("past_key_values")
        if isinstance(cache, ObservesInputs):
            if inputs.get("pixel_values") is not None and not adapter.sees_images:
                kind = type(module).__name__
                raise UnsupportedModelError(f"pixel_values: {kind} is a text model; an image needs a LLaVA model")
            ids = inputs.get("input_ids")
            several = ids is not None and ids.shape[1] > 1
            cache.before_forward(inputs, adapter.image_tokens(module, ids) if several else None)  # type: ignore[arg-type]

    model.__dict__[_HOOK] = model.register_forward_pre_hook(look, with_kwargs=True)


def remove(model: PreTrainedModel) -> None:
    """Takes the hook off a model."""
    handle = model.__dict__.pop(_HOOK, None)
    if handle is not None:
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
