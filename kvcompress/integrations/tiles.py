"""InternVL, Idefics3 and SmolVLM: images as tiles of one size."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.integrations.base import register_adapter
from kvcompress.integrations.grids import Piece, layout_of, runs
from kvcompress.integrations.llava import LlavaAdapter, pair
from kvcompress.policies.images import ImageLayout


class _Tiles(LlavaAdapter):
    """Image tokens that follow each other are tiles of one image; frames of a video are images."""

    tower_is_read = False

    def sides(self, model: PreTrainedModel) -> tuple[int, int]:
        """Rows and columns of tokens of a tile."""
        raise NotImplementedError

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """One grid a tile."""
        (height, width), is_image = self.sides(model), input_ids == model.config.image_token_id
        rows = iter(runs(is_image))

        def images(tokens: int) -> list[list[Piece]]:
            return [[Piece(height, width)] * max(1, length // (height * width)) for _, length in next(rows)]

        return layout_of(is_image, images)


@register_adapter("internvl")
class InternVLAdapter(_Tiles):
    """InternVLForConditionalGeneration over a decoder of LLaMA's shape."""

    def sides(self, model: PreTrainedModel) -> tuple[int, int]:
        """Of the tower, scaled by `downsample_ratio`."""
        tower, ratio = model.config.vision_config, model.config.downsample_ratio
        (height, width), (down, across) = pair(tower.image_size), pair(tower.patch_size)
        return int(height // down * ratio), int(width // across * ratio)


@register_adapter("idefics3", "smolvlm")
class Idefics3Adapter(_Tiles):
    """Idefics3ForConditionalGeneration and SmolVLMForConditionalGeneration; each tile counts as an image."""

    def sides(self, model: PreTrainedModel) -> tuple[int, int]:
        """Of the tower, divided by `scale_factor`."""
        tower, factor = model.config.vision_config, model.config.scale_factor
        (height, width), (down, across) = pair(tower.image_size), pair(tower.patch_size)
        return height // down // factor, width // across // factor
