"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: images as a base and tiles, videos as pooled frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import register_adapter
from kvcompress.integrations.grids import Piece, in_turn, layout_of, tile_grid, together
from kvcompress.integrations.llava import LlavaAdapter, pair
from kvcompress.policies.images import ImageLayout


@register_adapter("llava_next")
class LlavaNextAdapter(LlavaAdapter):
    """LlavaNextForConditionalGeneration over a decoder of LLaMA's shape."""

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """A base grid an image, then the grid that its tiles make up, with line ends."""
        images = _tiled(model, tile_side(model.config.vision_config), inputs, self.tile_grid)
        return layout_of(input_ids == model.config.image_token_id, in_turn(images))

    def by_image_token(
        self, model: PreTrainedModel, features: Float[Tensor, "images features channels"], inputs: dict[str, Any]
    ) -> Float[Tensor, "tokens channels"]:
        """The base, then the tiles as the model itself puts them together; zero at the ends of lines."""
        config, sizes = model.config, inputs["image_sizes"]
        side = config.vision_config.image_size
        tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
        of_images = torch.split(self.taken_features(model, features, inputs), tiles)
        ends, strategy = features.new_zeros(features.shape[2]), self.strategy(model, inputs)
        inner: Any = getattr(model, "model", model)
        return torch.cat(list(inner.pack_image_features(of_images, sizes, strategy, ends)[0]))

    def tile_grid(self, model: PreTrainedModel, inputs: dict[str, Any], number: int) -> tuple[int, int] | None:
        """Height and width of the grid that the tiles of an image make up; None if it has no tiles."""
        config, size = model.config, torch.as_tensor(inputs["image_sizes"])[number].tolist()
        side = tile_side(config.vision_config)
        return tile_grid(side, size, config.image_grid_pinpoints, config.vision_config.image_size)


class _WithVideos(LlavaNextAdapter):
    """Those that see videos too, whose frames are as large as a tile and pooled."""

    tower_is_read = False
    after_video = 0  # tokens

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"]) -> Tensor | None:
        """The processor writes one token per feature, of images and of videos."""
        is_image: Tensor = (input_ids == model.config.image_token_id) | (input_ids == model.config.video_token_id)
        return is_image

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """Images as of LLaVA-NeXT, and a grid for each frame of a video."""
        pictures = super().image_layout(model, input_ids, inputs)
        assert pictures is not None
        side = self.frame_side(model)
        frames = _frames(inputs, side**2, self.after_video)
        videos = in_turn([Piece(side, side, frames=number, after=self.after_video)] for number in frames)
        return together(pictures, layout_of(input_ids == model.config.video_token_id, videos))

    def frame_side(self, model: PreTrainedModel) -> int:
        """Features along a side of a frame."""
        raise NotImplementedError


@register_adapter("llava_next_video")
class LlavaNextVideoAdapter(_WithVideos):
    """LlavaNextVideoForConditionalGeneration over a decoder of LLaMA's shape."""

    def frame_side(self, model: PreTrainedModel) -> int:
        """Pooled by the stride; what is left over is dropped."""
        return int(tile_side(model.config.vision_config) // model.config.spatial_pool_stride)


@register_adapter("llava_onevision")
class LlavaOnevisionAdapter(_WithVideos):
    """LlavaOnevisionForConditionalGeneration over a decoder of LLaMA's shape."""

    after_video = 1  # a line end

    def frame_side(self, model: PreTrainedModel) -> int:
        """Scaled to half of it, rounded up."""
        return math.ceil(tile_side(model.config.vision_config) / 2)

    def tile_grid(self, model: PreTrainedModel, inputs: dict[str, Any], number: int) -> tuple[int, int] | None:
        """Scaled down where it has more features than so many tiles ("anyres_max_9"); none for one image of several."""
        together = inputs.get("batch_num_images")
        if together is not None and [n for n in torch.as_tensor(together).tolist() for _ in range(n)][number] > 1:
            return None
        grid = super().tile_grid(model, inputs, number)
        assert grid is not None
        most = int((inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio).removeprefix("anyres_max_"))
        ratio = math.sqrt(grid[0] * grid[1] / (most * tile_side(model.config.vision_config) ** 2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid


def tile_side(tower: Any) -> int:
    """Features along a side of a tile.

    Raises:
        UnsupportedModelError: if tiles are not square.
    """
    (height, width), (down, across) = pair(tower.image_size), pair(tower.patch_size)
    if height // down != width // across:
        raise UnsupportedModelError(
            f"reducer: the tiles of the vision tower have {height // down} x {width // across} features; LLaVA-NeXT's "
            "are put together from square ones"
        )
    return int(height // down)


def _tiled(
    model: PreTrainedModel,
    side: int,
    inputs: dict[str, Any],
    tile_grid_of: Callable[[PreTrainedModel, dict[str, Any], int], tuple[int, int] | None],
) -> Iterator[list[Piece]]:
    """The pieces of every image, from the images' sizes, or from their features where `generate` made those."""
    if inputs.get("image_sizes") is not None:
        for number in range(len(inputs["image_sizes"])):
            grid = tile_grid_of(model, inputs, number)
            yield [Piece(side, side, after=1)] if grid is None else [Piece(side, side), Piece(*grid, line_ends=1)]
        return
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    newline = getattr(model, "model", model).image_newline
    for features in () if encoded is None else encoded.pooler_output:
        if len(features) == side * side + 1:
            yield [Piece(side, side, after=1)]
            continue
        ends = (features[side * side :] == newline.to(features)).all(-1)
        lines = int(ends.sum())
        yield [Piece(side, side), Piece(lines, len(ends) // max(1, lines) - 1, line_ends=1)]


def _frames(inputs: dict[str, Any], tokens: int, after: int) -> list[int]:
    """Frames of every video, from its pixels, or from its features where `generate` made those.

    Args:
        inputs: the arguments of the forward.
        tokens: features of a frame.
        after: features after the last frame.
    """
    if inputs.get("pixel_values_videos") is not None:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        return [frames] * videos
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("video")
    return (
        [] if encoded is None else [(features[..., 0].numel() - after) // tokens for features in encoded.pooler_output]
    )
