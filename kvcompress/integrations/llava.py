"""LLaVA-1.5 and LLaVA-NeXT: a vision tower whose features take the places of image tokens."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import Adapter, register_adapter
from kvcompress.integrations.grids import Piece, grids_between_breaks, layout_of, pieces_within, tile_grid
from kvcompress.integrations.llama import LlamaAdapter
from kvcompress.policies.images import ImageLayout

_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")  # towers that refuse images of any other size


@register_adapter("llava", "llava_next")
class LlavaAdapter(Adapter):
    """LlavaForConditionalGeneration and LlavaNextForConditionalGeneration over a decoder of LLaMA's shape."""

    sees_images: ClassVar[bool] = True

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The language model; the vision tower keeps its own attention."""
        return cast(PreTrainedModel, model.get_decoder())  # type: ignore[no-untyped-call]

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch columns"]) -> Tensor | None:
        """The processor writes one image token per vision feature, so ids tell."""
        return cast(Tensor, input_ids == model.config.image_token_id)

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch columns"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """One grid an image; for LLaVA-NeXT a base grid, then the grid that its tiles make up, with line ends.

        Where all features of the vision tower are taken ("full"), a class token gives one more, before the others.
        """
        config, is_image, used = model.config, input_ids == model.config.image_token_id, 0
        if config.model_type == "llava_next":
            side = _tile_side(config.vision_config)
            tiles = iter(_tile_grids(model, side, inputs))

            def images(tokens: int) -> list[list[Piece]]:
                found: list[list[Piece]] = []
                while tokens > 0 and (tile := next(tiles, None)) is not None:
                    found.append([Piece(side, side), tile])
                    tokens -= side * side + tile.tokens
                return found

        else:
            strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
            grids = _image_grids(config.vision_config, input_ids, is_image, inputs)

            def images(tokens: int) -> list[list[Piece]]:
                nonlocal used
                pieces = pieces_within(tokens, grids[used:], class_token=strategy == "full")
                used += len(pieces)
                return [[piece] for piece in pieces]

        return layout_of(is_image, images)

    def check(self, model: PreTrainedModel) -> None:
        """Refuses language models of another shape."""
        kind = self.decoder(model).config.model_type
        if kind not in _DECODERS:
            raise UnsupportedModelError(
                f"model: the language model of {type(model).__name__} is of the type '{kind}'; known: "
                f"{', '.join(_DECODERS)}. Register an adapter of your own for it"
            )
        super().check(model)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of what a configuration gives as one number or as two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _image_grids(tower: Any, input_ids: Tensor, is_image: Tensor, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """Height and width, in features, of each image of a LLaVA, as the vision tower makes them.

    From the images' sizes, or their pixels; where `generate` made the features and handed neither on, from the tower's
    only size, or from the tokens that separate the rows of an image.

    Raises:
        UnsupportedModelError: if the tower takes images of several sizes and nothing tells which these have.
    """
    down, across = _pair(tower.patch_size)
    if inputs.get("image_sizes") is not None:
        return [(height // down, width // across) for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()]
    if inputs.get("pixel_values") is not None:
        height, width = inputs["pixel_values"].shape[-2:]
        return [(height // down, width // across)] * len(inputs["pixel_values"])
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if tower.model_type in _ONE_SIZE:
        height, width = _pair(tower.image_size)
        grid = (height // down, width // across)
        return [grid] * max(1, int(is_image.sum()) // max(1, grid[0] * grid[1]))
    counts = [] if encoded is None else [len(features) for features in encoded.pooler_output]
    return grids_between_breaks(input_ids, is_image, counts)


def _tile_side(tower: Any) -> int:
    """Features along a side of a tile of LLaVA-NeXT."""
    (height, width), (down, across) = _pair(tower.image_size), _pair(tower.patch_size)
    if height // down != width // across:
        raise UnsupportedModelError(
            f"reducer: the tiles of the vision tower have {height // down} x {width // across} features; LLaVA-NeXT's "
            "are put together from square ones"
        )
    return height // down


def _tile_grids(model: PreTrainedModel, side: int, inputs: dict[str, Any]) -> list[Piece]:
    """The grid of every image's tiles, from the images' sizes, or from their features where `generate` made those."""
    config = model.config
    if inputs.get("image_sizes") is not None:
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        grids = [tile_grid(side, size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes]
        return [Piece(*grid, line_ends=1) for grid in grids]
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    newline = getattr(model, "model", model).image_newline
    found = []
    for features in () if encoded is None else encoded.pooler_output:
        ends = (features[side * side :] == newline.to(features)).all(-1)
        lines = int(ends.sum())
        found.append(Piece(lines, len(ends) // max(1, lines) - 1, line_ends=1))
    return found


__all__ = ["LlamaAdapter", "LlavaAdapter"]
