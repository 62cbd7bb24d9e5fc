"""Adapters: what is asked about a model; found by the model type in its configuration, or else by its shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.projection import effective_weight
from kvcompress.integrations.shape import (
    LayerKind,
    attention_of,
    decoder_of,
    frequencies_of,
    layer_kinds,
    output_of,
    own_layers,
    ranges,
    why_not,
    window_of,
)
from kvcompress.integrations.tower import unreadable
from kvcompress.integrations.wrapped import unwrapped
from kvcompress.parallel import ALONE, HeadGroup, head_group
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
        """The attention module of every decoder layer that has one."""
        found = map(self.attention_of, self.layers(model))
        return [attention for attention in found if isinstance(attention, nn.Module)]

    def attention_of(self, layer: nn.Module) -> nn.Module | None:
        """The attention module of a decoder layer; None if it has none."""
        return attention_of(layer) or getattr(layer, "self_attn", None)

    def kinds(self, model: PreTrainedModel) -> list[LayerKind]:
        """What each decoder layer remembers: those that are "full" are compressed, others stay transformers' own."""
        return layer_kinds(self.decoder(model))

    def compressed_layers(self, model: PreTrainedModel) -> list[int]:
        """Numbers of the decoder layers that attend to everything before them."""
        return [number for number, kind in enumerate(self.kinds(model)) if kind == "full"]

    def own_layers(self, model: PreTrainedModel) -> dict[int, Any]:
        """Empty cache layers of transformers for the decoder layers that are not compressed, by number."""
        kinds = self.kinds(model)
        if set(kinds) == {"full"}:
            return {}
        made = zip(kinds, own_layers(self.decoder(model)), strict=True)
        return {number: layer for number, (kind, layer) in enumerate(made) if kind != "full"}

    def layer_weights(self, decoder: nn.Module, attention: nn.Module) -> LayerWeights:
        """What scorers may read of a layer's weights; looked up anew at each scoring forward, never kept."""
        output, unknown = effective_weight(output_of(attention))
        return LayerWeights(output, frequencies_of(decoder, attention), unknown)

    def head_group(self, model: PreTrainedModel) -> HeadGroup:
        """The processes that share each layer's heads where the model was loaded with a plan of tensor parallelism.

        Raises:
            UnsupportedModelError: if some process holds anything but its share of whole heads.
        """
        attentions = self.attention_modules(model)
        query = getattr(getattr(attentions[0], "q_proj", None), "weight", None)
        mesh = getattr(model, "_device_mesh", None) or getattr(query, "device_mesh", None)
        if mesh is None:
            return ALONE
        config = self.decoder(model).config
        heads = config.num_attention_heads
        return head_group(attentions, heads, getattr(config, "num_key_value_heads", None) or heads, mesh)

    sees_images: ClassVar[bool] = False

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"]) -> Tensor | None:
        """Which input ids stand for image tokens; None for a model without vision."""
        return None

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
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

    def tower_attentions(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention modules of the vision tower's layers, which `kvcompress.integrations.tower.look` can read.

        Raises:
            UnsupportedModelError: if the tower cannot be read, or its features are not one for one image tokens.
        """
        raise unreadable(model, "nobody knows how to find it")

    def by_image_token(
        self, model: PreTrainedModel, features: Float[Tensor, "images features channels"], inputs: dict[str, Any]
    ) -> Float[Tensor, "tokens channels"]:
        """Arranges what belongs to the tower's features in the order of the image tokens, as the model does features.

        Args:
            model: the model.
            features: of each image or tile, in the order in which the tower made them, a class token first if it has
                one; for models with `tower_attentions`.
            inputs: `image_sizes` and `vision_feature_select_strategy`, if the call gave them.
        """
        raise unreadable(model, "nobody knows where its features go")

    position_axes: ClassVar[int] = 1  # 3 where rotary positions are those of time, row and column (M-RoPE)

    def rotary_offset(self, model: PreTrainedModel) -> Tensor | None:
        """What the model keeps of a conversation to place its next tokens, `[rows, 1]`; None if it keeps nothing."""
        return None

    def set_rotary_offset(self, model: PreTrainedModel, offset: Tensor | None) -> None:
        """Gives the model what it kept of another conversation, which goes on now; for models of several axes."""
        raise NotImplementedError(f"{type(self).__name__}: position_axes is not 1, so it needs set_rotary_offset")

    typed: ClassVar[bool] = False  # whether `token_type_ids` say, one by one, which tokens attend both ways

    def reads_types(self, inputs: dict[str, Any]) -> bool:
        """Whether a call with these arguments is one in which the model looks at the types, if it is `typed`."""
        return True

    def adds_after(self, model: PreTrainedModel) -> int:
        """Number of first decoder layers after which the model itself adds to hidden states at all positions."""
        return 0

    def check(self, model: PreTrainedModel) -> None:
        """Refuses decoders of which no layer attends to everything before it, or some layer keeps something unknown.

        Raises:
            UnsupportedModelError: naming the layers and what they are.
        """
        kinds, name = self.kinds(model), type(model).__name__
        odd = [index for index, kind in enumerate(kinds) if kind == "other"]
        if odd:
            raise UnsupportedModelError(
                f"model: layers {ranges(odd)} of {name} keep something else than keys and values, or than a state that "
                "transformers' own cache layers hold; a compressed cache knows no place for it, use another cache"
            )
        if "full" not in kinds:
            raise UnsupportedModelError(
                f"model: layers {ranges(list(range(len(kinds))))} of {name} slide or sum up, and none attends to "
                "everything before it: there is nothing to compress, and DynamicCache holds no more than that"
            )

    def window(self, model: PreTrainedModel) -> int | None:
        """Positions of a conversation up to which layers that slide are served; None where one does not slide."""
        decoder = self.decoder(model)
        return window_of(decoder) if self.kinds(model) == layer_kinds(decoder) else None

    def without_window(self, model: PreTrainedModel) -> str:
        """How to give a model full attention, where every layer slides."""
        config = self.decoder(model).config
        fields = [name for name in ("use_sliding_window", "sliding_window") if hasattr(config, name)]
        full = [f"config.{name} = {False if name.startswith('use') else None}" for name in fields]
        if getattr(config, "layer_types", None):
            full.append("config.layer_types = ['full_attention'] * config.num_hidden_layers")
        return f"before the model is made from its (text) config, set {'; '.join(full)}"


class DecoderAdapter(Adapter):
    """Any text model whose decoder has the usual shape, as `shape.why_not` tells it; taken where no other is named."""

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model.get_decoder()`, or the model itself where it is the bare decoder."""
        found = decoder_of(model)
        if found is None:
            raise UnsupportedModelError(f"model: {type(model).__name__} has no decoder with a list of layers")
        return found


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
    """The adapter of a model, or of the one inside a wrapper (`wrapped.unwrapped`).

    Raises:
        UnsupportedModelError: if no adapter is registered for its type and its shape is none that can be served; the
            message says why.
    """
    model = unwrapped(model)
    model_type = str(model.config.model_type)
    if model_type not in _ADAPTERS and (reason := why_not(model)):
        raise UnsupportedModelError(
            f"model: no adapter for the model type '{model_type}' ({type(model).__name__}), which {reason}. Known by "
            f"name: {', '.join(known_models())}; by shape: decoders whose layers each hold one attention with rotary "
            "embeddings that goes through transformers' attention interface. What can be served all the same takes an "
            f"adapter of your own: @kvcompress.integrations.register_adapter('{model_type}') on a subclass of "
            "kvcompress.integrations.Adapter"
        )
    adapter = _ADAPTERS.get(model_type, DecoderAdapter)()
    adapter.check(model)
    return adapter
