"""What kvcompress must know of a model: where its decoder is, and which of its tokens are images."""

from kvcompress.integrations.base import Adapter, adapter_for, known_models, register_adapter
from kvcompress.integrations.llama import LlamaAdapter
from kvcompress.integrations.llava import LlavaAdapter
from kvcompress.integrations.qwen_vl import QwenVLAdapter

__all__ = ["Adapter", "LlamaAdapter", "LlavaAdapter", "QwenVLAdapter", "adapter_for", "known_models", "register_adapter"]
