"""LLaVA-1.5 and VipLLaVA: a vision tower whose features take the places of image tokens, one grid an image."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import Adapter, register_adapter
from kvcompress.integrations.grids import Piece, grids_between_breaks, layout_of, pieces_within
from kvcompress.integrations.tower import attentions_of, unreadable
from kvcompress.policies.images import ImageLayout

_WITHOUT_CLASS_TOKEN = ("pixtral", "siglip_vision_model", "siglip2_vision_model")  # types of towers
_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")  # towers that refuse images of any other size


@register_adapter("llava", "vipllava")
class LlavaAdapter(Adapter):
    """LlavaForConditionalGeneration and VipLlavaForConditionalGeneration over a decoder of LLaMA's shape."""

    sees_images: ClassVar[bool] = True
    decoders: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")  # types of language models

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The language model; the vision tower keeps its own attention."""
        return cast(PreTrainedModel, model.get_decoder())  # type: ignore[no-untyped-call]

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"]) -> Tensor | None:
        """The processor writes one image token per vision feature, so ids tell."""
        return cast(Tensor, input_ids == model.config.image_token_id)

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """One grid an image.

        Where all features of the vision tower are taken ("full"), its class token, if any, comes before the others.
        """
        config, is_image, used = model.config, input_ids == model.config.image_token_id, 0
        full = self.strategy(model, inputs) == "full"
        class_token = full and config.vision_config.model_type not in _WITHOUT_CLASS_TOKEN
        grids = _image_grids(config, input_ids, is_image, inputs)

        def images(tokens: int) -> list[list[Piece]]:
            nonlocal used
            pieces = pieces_within(tokens, grids[used:], class_token)
            used += len(pieces)
            return [[piece] for piece in pieces]

        return layout_of(is_image, images)

    tower_is_read: ClassVar[bool] = True  # whether the tower's features are image tokens, one for one

    def tower_attentions(self, model: PreTrainedModel) -> list[nn.Module]:
        """Those of a tower of CLIP or SigLIP."""
        if not self.tower_is_read:
            raise unreadable(model, "its features are not known to be image tokens, one for one,")
        return attentions_of(model, getattr(model, "model", model).vision_tower)

    def by_image_token(
        self, model: PreTrainedModel, features: Float[Tensor, "images features channels"], inputs: dict[str, Any]
    ) -> Float[Tensor, "tokens channels"]:
        """Image after image, without the class token where only patches are taken ("default")."""
        return self.taken_features(model, features, inputs).flatten(0, 1)

    def taken_features(
        self, model: PreTrainedModel, features: Float[Tensor, "images features channels"], inputs: dict[str, Any]
    ) -> Float[Tensor, "images fewer channels"]:
        """What the feature select strategy leaves of each image; VipLLaVA has none and takes patches."""
        return features[:, 1:] if self.strategy(model, inputs) == "default" else features

    def strategy(self, model: PreTrainedModel, inputs: dict[str, Any]) -> str:
        """Whether the first feature of each image is left out ("default") or not ("full")."""
        asked = inputs.get("vision_feature_select_strategy")
        return str(asked or getattr(model.config, "vision_feature_select_strategy", "default"))

    def check(self, model: PreTrainedModel) -> None:
        """Refuses language models of another shape."""
        kind = self.decoder(model).config.model_type
        if kind not in self.decoders:
            raise UnsupportedModelError(
                f"model: the language model of {type(model).__name__} is of the type '{kind}'; known: "
                f"{', '.join(self.decoders)}. Register an adapter of your own for it"
            )
        super().check(model)


def pair(size: Any) -> tuple[int, int]:
    """Height and width of what a configuration gives as one number or as two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _image_grids(config: Any, input_ids: Tensor, is_image: Tensor, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """Height and width, in features, of each image of a LLaVA, as the vision tower makes and Mistral 3 merges them.

    From the images' sizes, or their pixels; where `generate` made the features and handed neither on, from the tower's
    only size, or from the tokens that separate the rows of an image.

    Raises:
        UnsupportedModelError: if the tower takes images of several sizes and nothing tells which these have.
    """
    tower, merged = config.vision_config, getattr(config, "spatial_merge_size", 1)
    down, across = (side * merged for side in pair(tower.patch_size))
    if inputs.get("image_sizes") is not None:
        return [(height // down, width // across) for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()]
    if inputs.get("pixel_values") is not None:
        height, width = inputs["pixel_values"].shape[-2:]
        return [(height // down, width // across)] * len(inputs["pixel_values"])
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if tower.model_type in _ONE_SIZE:
        height, width = pair(tower.image_size)
        grid = (height // down, width // across)
        return [grid] * max(1, int(is_image.sum()) // max(1, grid[0] * grid[1]))
    counts = [] if encoded is None else [len(features) for features in encoded.pooler_output]
    return grids_between_breaks(input_ids, is_image, counts)
