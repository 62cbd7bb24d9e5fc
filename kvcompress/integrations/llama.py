"""LLaMA and text models of the same shape."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from kvcompress.integrations.base import Adapter, register_adapter


@register_adapter("llama", "mistral", "qwen2", "qwen3")
class LlamaAdapter(Adapter):
    """LlamaForCausalLM, Mistral without sliding window, Qwen2 and Qwen3, or their bare decoders."""

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model.model`, or the model itself where it is the bare decoder."""
        return cast(PreTrainedModel, model if hasattr(model, "layers") else model.get_decoder())  # type: ignore[no-untyped-call]
