"""Adapters: one small class for each family of models, found by the model type in the configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.projection import effective_weight
from kvcompress.parallel import HeadGroup, head_group
from kvcompress.policies.context import LayerWeights
from kvcompress.policies.images import ImageLayout

AdapterT = TypeVar("AdapterT", bound="type[Adapter]")


class Adapter(ABC):
    """Answers what the cache manager asks about one family of models; holds no reference to the model.

    A family is described by subclassing and `@register_adapter("model_type")`.
    """

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The module that owns the decoder layers and takes the cache."""

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(self.decoder(model).layers)  # type: ignore[arg-type]

    def attention_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention module of every decoder layer."""
        return [layer.self_attn for layer in self.layers(model)]  # type: ignore[misc]

    def layer_weights(self, decoder: nn.Module, attention: nn.Module) -> LayerWeights:
        """What scorers may read of a layer's weights; looked up anew at each scoring forward, never kept."""
        output, unknown = effective_weight(getattr(attention, "o_proj", None))
        frequencies = getattr(getattr(decoder, "rotary_emb", None), "inv_freq", None)
        return LayerWeights(output, frequencies, unknown)

    def head_group(self, model: PreTrainedModel) -> HeadGroup:
        """The processes that share each layer's heads where the model was loaded with a plan of tensor parallelism.

        Raises:
            UnsupportedModelError: if some process holds anything but its share of whole heads.
        """
        attentions, config = self.attention_modules(model), self.decoder(model).config
        query = getattr(getattr(attentions[0], "q_proj", None), "weight", None)
        mesh = getattr(model, "_device_mesh", None) or getattr(query, "device_mesh", None)
        return head_group(attentions, config.num_attention_heads, config.num_key_value_heads, mesh)

    sees_images: ClassVar[bool] = False

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch columns"]) -> Tensor | None:
        """Which input ids stand for image tokens; None for a model without vision."""
        return None

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch columns"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """Where each image token among the input ids belongs in its image; None for a model without vision.

        Args:
            model: the model.
            input_ids: ids of a forward; whole images, as the processor wrote them.
            inputs: all arguments of the forward by name.

        Raises:
            UnsupportedModelError: if the number of image tokens fits no grid that this family makes.
        """
        return None

    position_axes: ClassVar[int] = 1  # 3 where rotary positions are those of time, row and column (M-RoPE)

    def rotary_offset(self, model: PreTrainedModel) -> Tensor | None:
        """What the model keeps of a conversation to place its next tokens, `[rows, 1]`; None if it keeps nothing."""
        return None

    def set_rotary_offset(self, model: PreTrainedModel, offset: Tensor | None) -> None:
        """Gives the model what it kept of another conversation, which goes on now; for models of several axes."""
        raise NotImplementedError(f"{type(self).__name__}: position_axes is not 1, so it needs set_rotary_offset")

    def adds_after(self, model: PreTrainedModel) -> int:
        """Number of first decoder layers after which the model itself adds to hidden states of all columns."""
        return 0

    def check(self, model: PreTrainedModel) -> None:
        """Refuses decoders with layers that do not attend to everything before them.

        Raises:
            UnsupportedModelError: naming the layers and what they are.
        """
        config = self.decoder(model).config
        kinds = list(getattr(config, "layer_types", None) or [])
        if not kinds and getattr(config, "sliding_window", None) is not None:
            kinds = ["sliding_attention"] * config.num_hidden_layers
        odd = [index for index, kind in enumerate(kinds) if kind != "full_attention"]
        if odd:
            fields = [name for name in ("use_sliding_window", "sliding_window") if hasattr(config, name)]
            full = [f"config.{name} = {False if name.startswith('use') else None}" for name in fields]
            if getattr(config, "layer_types", None):
                full.append("config.layer_types = ['full_attention'] * config.num_hidden_layers")
            raise UnsupportedModelError(
                f"model: layers {_ranges(odd)} of {type(model).__name__} are {kinds[odd[0]]}; a compressed cache needs "
                "full attention in every layer. Sequences that stay within the window lose nothing by it: before the "
                f"model is made from its (text) config, set {'; '.join(full)}"
            )


_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(*model_types: str) -> Callable[[AdapterT], AdapterT]:
    """Class decorator: the adapter serves models whose `config.model_type` is one of these."""

    def decorate(adapter: AdapterT) -> AdapterT:
        for model_type in model_types:
            _ADAPTERS[model_type] = adapter
        return adapter

    return decorate


def known_models() -> list[str]:
    """Model types that an adapter is registered for."""
    return sorted(_ADAPTERS)


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model.

    Raises:
        UnsupportedModelError: if no adapter is registered for its type; the message lists those that are known.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, PreTrainedModel):
        inner = _unwrapping(model)
        raise UnsupportedModelError(
            f"model: must be a transformers model, got {type(model).__name__}"
            + (f"; make the cache for the model inside, {inner}, and go on calling this one" if inner else "")
        )
    if model_type not in _ADAPTERS:
        raise UnsupportedModelError(
            f"model: no adapter for the model type '{model_type}' ({type(model).__name__}); known: "
            f"{', '.join(known_models())}. For a model of the same shape: subclass "
            "kvcompress.integrations.LlamaAdapter "
            f"and decorate it with @kvcompress.integrations.register_adapter('{model_type}')"
        )
    adapter = _ADAPTERS[model_type]()
    adapter.check(model)
    return adapter


def _unwrapping(model: Any) -> str:
    """The expression that gives the model inside a wrapper (PEFT, torch.compile, DataParallel); empty if it is none."""
    found, expression = model, "model"
    while not isinstance(found, PreTrainedModel):
        if callable(getattr(found, "get_base_model", None)):
            found, expression = found.get_base_model(), f"{expression}.get_base_model()"
        elif isinstance(getattr(found, "_orig_mod", None), nn.Module):
            found, expression = found._orig_mod, f"{expression}._orig_mod"
        elif isinstance(getattr(found, "module", None), nn.Module):
            found, expression = found.module, f"{expression}.module"
        else:
            return ""
    return expression


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
