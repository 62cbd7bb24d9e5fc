"""LLaMA and text models of the same shape."""

from __future__ import annotations

from kvcompress.integrations.base import DecoderAdapter, register_adapter


@register_adapter("llama", "mistral", "qwen2", "qwen3")
class LlamaAdapter(DecoderAdapter):
    """LlamaForCausalLM, Mistral, Qwen2 and Qwen3, or their bare decoders."""
