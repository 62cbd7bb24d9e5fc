"""LLaVA-1.5 and LLaVA-NeXT: a vision tower whose features take the places of image tokens."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import Adapter, register_adapter
from kvcompress.integrations.grids import Piece, layout_of, tile_grid
from kvcompress.integrations.llama import LlamaAdapter
from kvcompress.policies.images import ImageLayout

_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


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
        """One square grid an image; for LLaVA-NeXT a base grid, then the grid that its tiles make up, with line ends.

        Where all features of the vision tower are taken ("full"), a class token gives one more, before the others.
        """
        config, is_image = model.config, input_ids == model.config.image_token_id
        side = config.vision_config.image_size // config.vision_config.patch_size
        if config.model_type == "llava_next":
            tiles = iter(_tile_grids(model, side, inputs))

            def images(tokens: int) -> list[list[Piece]]:
                found: list[list[Piece]] = []
                while tokens > 0 and (tile := next(tiles, None)) is not None:
                    found.append([Piece(side, side), tile])
                    tokens -= side * side + tile.tokens
                return found

        else:
            strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
            plain, with_class = Piece(side, side), Piece(side, side, before=1)

            def images(tokens: int) -> list[list[Piece]]:
                piece = with_class if strategy == "full" and tokens % with_class.tokens == 0 else plain
                return [[piece]] * max(1, tokens // piece.tokens) if tokens else []

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
