"""Mistral 3: images of any shape, whose features are merged in squares, rows with a token between them."""

from __future__ import annotations

from kvcompress.integrations.base import register_adapter
from kvcompress.integrations.llava import LlavaAdapter


@register_adapter("mistral3")
class Mistral3Adapter(LlavaAdapter):
    """Mistral3ForConditionalGeneration over a decoder of LLaMA's shape; all features are taken, and none is a class's.

    Grids follow from `image_sizes`; where `generate` hands none on, from the tokens between the rows.
    """

    tower_is_read = False
