"""Watching the vision tower of a model, while it makes the features of the images that are about to be reduced."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModeError
from kvcompress.integrations import Adapter
from kvcompress.integrations.tower import CLASS_TOKEN, layer_of_features, look, unreadable
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import TowerView

_OF_INPUTS = ("image_sizes", "vision_feature_select_strategy")
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)  # of the call in progress


@dataclass
class Watch:
    """What is looked at, and what was seen so far.

    Attributes:
        reducer: name of who wants to know, for errors.
        attention: the attention module that is looked at.
        class_token: whether the attention of its first feature counts alone.
        inputs: arguments of the call that say how features become image tokens.
        seen: what `look` gave, for each time that the tower ran.
    """

    reducer: str
    attention: weakref.ReferenceType[nn.Module]
    class_token: bool
    inputs: dict[str, Any]
    seen: list[Tensor] = field(default_factory=list)

    def by_position(
        self, adapter: Adapter, model: PreTrainedModel, is_image: Bool[Tensor, "batch positions"]
    ) -> TowerView:
        """What was seen of the image tokens in some positions; zero elsewhere.

        Raises:
            UnsupportedModeError: if the tower did not run, or made other features than these.
        """
        if not self.seen:
            raise UnsupportedModeError(
                f"reducer {self.reducer}: reads the attention of the vision tower, which did not run in this call, "
                "since image features came ready made; pass pixel_values, or choose a reducer that reads no tower "
                "(divprune, cdpruner)"
            )
        of_tokens = adapter.by_image_token(model, torch.cat(self.seen), self.inputs).to(is_image.device)
        counts = is_image.sum(1).tolist()
        copies = sum(counts) // max(1, len(of_tokens))  # of each row, for beams and several answers
        if copies > 1 and len(counts) % copies == 0:
            ends = np.cumsum([0, *counts[::copies]]).tolist()
            parts = [of_tokens[first:end] for first, end in pairwise(ends)]
            of_tokens = torch.cat([part for part in parts for _ in range(copies)])
        if len(of_tokens) != sum(counts):
            raise UnsupportedModeError(
                f"reducer {self.reducer}: the vision tower made {len(of_tokens)} features in this call, but this "
                f"forward has {sum(counts)} image tokens; read whole prompts (no prefill_chunk_size) with the "
                "pixel_values of their own images, or choose a reducer that reads no tower (divprune, cdpruner)"
            )
        found = of_tokens.new_zeros(*is_image.shape, of_tokens.shape[1])
        found[is_image] = of_tokens
        return TowerView(found[..., 0], found[..., 1:])


def begin(reducer: Reducer, adapter: Adapter, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Watch:
    """Watches the tower from here on, until `end`.

    Raises:
        UnsupportedModelError: if the features are no layer's output.
    """
    attentions, config = adapter.tower_attentions(model), model.config
    own = getattr(config, "vision_feature_layer", None) or getattr(config, "vision_feature_layers", None)
    number = layer_of_features(inputs.get("vision_feature_layer") or own or -1, len(attentions))
    if not 0 <= number < len(attentions):
        raise unreadable(model, f"features are taken before its first layer (vision_feature_layer={own})")
    known = {name: inputs[name] for name in _OF_INPUTS if inputs.get(name) is not None}
    class_token = CLASS_TOKEN[config.vision_config.model_type]
    watch = Watch(reducer.name, weakref.ref(attentions[number]), class_token, known)
    _watch.set(watch)
    return watch


def end() -> None:
    """Watches no more."""
    _watch.set(None)


def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Looks at an attention module that is about to run, if it is watched."""
    watch = _watch.get()
    if watch is not None and watch.attention() is module:
        watch.seen.append(look(module, args[0] if args else kwargs["hidden_states"], watch.class_token))
