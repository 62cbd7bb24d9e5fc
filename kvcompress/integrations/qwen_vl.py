"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any shape, and positions of three axes (M-RoPE)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import Adapter, register_adapter
from kvcompress.integrations.grids import Piece, in_turn, layout_of, runs, together
from kvcompress.policies.images import ImageLayout


@register_adapter("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
class QwenVLAdapter(Adapter):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL; the last adds features to image tokens after its first layers (DeepStack)."""

    sees_images: ClassVar[bool] = True
    position_axes: ClassVar[int] = 3

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The language model; the vision tower keeps its own attention."""
        return cast(PreTrainedModel, model.get_decoder())  # type: ignore[no-untyped-call]

    def adds_after(self, model: PreTrainedModel) -> int:
        """As many layers as the vision tower has levels whose features are added."""
        return len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))

    def image_tokens(self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"]) -> Tensor | None:
        """The processor writes one token per feature that is left after merging, of images and of videos."""
        is_image: Tensor = (input_ids == model.config.image_token_id) | (input_ids == model.config.video_token_id)
        return is_image

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """One grid an image, and one for each two frames of a video (`temporal_patch_size`).

        From `image_grid_thw` and `video_grid_thw`; where `generate` made the features and handed neither on, from the
        positions that it gives the tokens.
        """
        merge, layouts = model.config.vision_config.spatial_merge_size, []
        for kind in ("image", "video"):
            marked = input_ids == getattr(model.config, f"{kind}_token_id")
            given = inputs.get(f"{kind}_grid_thw")
            if given is None:
                sizes = _from_positions(marked, inputs, kind)
            else:
                sizes = ((t, down // merge, across // merge) for t, down, across in torch.as_tensor(given).tolist())
            images = (_piece(kind, *size) for size in sizes)
            layouts.append(layout_of(marked, in_turn(images)))
        return together(*layouts)

    def rotary_offset(self, model: PreTrainedModel) -> Tensor | None:
        """What the model adds to the number of a token after images, `[rows, 1]`, which it keeps itself."""
        return cast(Tensor | None, _inner(model).rope_deltas)

    def set_rotary_offset(self, model: PreTrainedModel, offset: Tensor | None) -> None:
        """Gives the model that of the conversation that goes on."""
        _inner(model).rope_deltas = offset


def _piece(kind: str, frames: int, height: int, width: int) -> list[Piece]:
    return [Piece(height, width, frames=frames if kind == "video" else None)]


def _inner(model: PreTrainedModel) -> Any:
    """The model without its head."""
    return model if hasattr(model, "rope_deltas") else model.model


def _from_positions(marked: Tensor, inputs: dict[str, Any], kind: str) -> Iterator[tuple[int, int, int]]:
    """Frames, rows and columns of every image or video, row by row, from positions `[..., batch, positions]` of 3 axes.

    Raises:
        UnsupportedModelError: if there are none.
    """
    positions, found = inputs.get("position_ids"), runs(marked)
    if not any(found):
        return
    if not isinstance(positions, Tensor) or positions.ndim != 3 or positions.shape[0] < 3:
        raise UnsupportedModelError(
            f"reducer: nothing tells the shape of the {kind}s; pass {kind}_grid_thw, as the processor gives it"
        )
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    known = iter([] if encoded is None else [len(features) for features in encoded.pooler_output])
    sides = positions[-2:].expand(2, *marked.shape).cpu()
    for row, row_runs in enumerate(found):
        left = 0  # tokens of a video whose frames have text between them
        for first, length in row_runs:
            if left <= 0:
                left = tokens = next(known, length)
                own = sides[:, row, first : first + length]
                height, width = (own.amax(1) - own.amin(1) + 1).tolist()
                yield max(1, tokens // (height * width)), height, width
            left -= length


__all__ = ["QwenVLAdapter"]
