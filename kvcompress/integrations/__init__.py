"""What kvcompress must know of a model: where its decoder is, and which of its tokens are images."""

from kvcompress.integrations.base import Adapter, DecoderAdapter, adapter_for, known_models, register_adapter
from kvcompress.integrations.gemma import Gemma3Adapter, PaliGemmaAdapter
from kvcompress.integrations.llama import LlamaAdapter
from kvcompress.integrations.llava import LlavaAdapter
from kvcompress.integrations.llava_next import LlavaNextAdapter, LlavaNextVideoAdapter, LlavaOnevisionAdapter
from kvcompress.integrations.mistral3 import Mistral3Adapter
from kvcompress.integrations.qwen_vl import QwenVLAdapter
from kvcompress.integrations.tiles import Idefics3Adapter, InternVLAdapter

__all__ = [
    "Adapter",
    "DecoderAdapter",
    "Gemma3Adapter",
    "Idefics3Adapter",
    "InternVLAdapter",
    "LlamaAdapter",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaNextVideoAdapter",
    "LlavaOnevisionAdapter",
    "Mistral3Adapter",
    "PaliGemmaAdapter",
    "QwenVLAdapter",
    "adapter_for",
    "known_models",
    "register_adapter",
]
