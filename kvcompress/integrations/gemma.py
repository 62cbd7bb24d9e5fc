"""Gemma 3 and PaliGemma: pictures of one size, whose tokens attend to those after them too while the prompt is read."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.integrations.base import register_adapter
from kvcompress.integrations.grids import Piece, in_turn, layout_of
from kvcompress.integrations.llava import LlavaAdapter
from kvcompress.policies.images import ImageLayout


@register_adapter("gemma3")
class Gemma3Adapter(LlavaAdapter):
    """Gemma3ForConditionalGeneration: the tokens of a picture, or of a crop of one, attend to each other both ways.

    Which do, `token_type_ids` say, by which the model makes its mask; the cache takes the mask as it comes.
    """

    decoders: ClassVar[tuple[str, ...]] = ("gemma3_text",)
    typed: ClassVar[bool] = True

    tower_is_read = False

    def image_layout(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch positions"], inputs: dict[str, Any]
    ) -> ImageLayout | None:
        """One grid an image, as the projector pools it; crops that the processor makes of an image count as images."""
        side = int(model.config.mm_tokens_per_image**0.5)
        images = ([Piece(side, side)] for _ in range(input_ids.numel()))
        return layout_of(input_ids == model.config.image_token_id, in_turn(images))


@register_adapter("paligemma")
class PaliGemmaAdapter(LlavaAdapter):
    """PaliGemmaForConditionalGeneration over Gemma or Gemma 2: all tokens of a prompt attend to each other both ways.

    Where `token_type_ids` are given, as its processor does; of layers that slide, those of full attention alone count.
    """

    decoders: ClassVar[tuple[str, ...]] = ("gemma", "gemma2")
    typed: ClassVar[bool] = True

    tower_is_read = False

    def reads_types(self, inputs: dict[str, Any]) -> bool:
        """With pictures; later forwards are causal, whatever types they bring."""
        return inputs.get("pixel_values") is not None
