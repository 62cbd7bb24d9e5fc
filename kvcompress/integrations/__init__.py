"""What kvcompress must know of a model: where its decoder is, and which of its tokens are images."""

from kvcompress.integrations.base import Adapter, DecoderAdapter, adapter_for, known_models, register_adapter
from kvcompress.integrations.llama import LlamaAdapter
from kvcompress.integrations.llava import LlavaAdapter

__all__ = [
    "Adapter",
    "DecoderAdapter",
    "LlamaAdapter",
    "LlavaAdapter",
    "adapter_for",
    "known_models",
    "register_adapter",
]
