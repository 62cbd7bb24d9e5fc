"""LLaVA-1.5 and LLaVA-NeXT: a vision tower whose features take the places of image tokens."""

from __future__ import annotations

from typing import ClassVar, cast

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations.base import Adapter, register_adapter
from kvcompress.integrations.llama import LlamaAdapter

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

    def check(self, model: PreTrainedModel) -> None:
        """Refuses language models of another shape."""
        kind = self.decoder(model).config.model_type
        if kind not in _DECODERS:
            raise UnsupportedModelError(
                f"model: the language model of {type(model).__name__} is of the type '{kind}'; known: "
                f"{', '.join(_DECODERS)}. Register an adapter of your own for it"
            )
        super().check(model)


__all__ = ["LlamaAdapter", "LlavaAdapter"]
