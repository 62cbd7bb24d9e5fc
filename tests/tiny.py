"""Tiny models with random weights and the true architecture, and inputs for them.

Every call with the same name and seed gives the same weights, so a test can compare a model that a compressed cache
touched with one that none ever did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 97
IMAGE_TOKEN = 96
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that every row generates as many tokens as asked for
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
# Queries and keys so large that attention is far from uniform; logits so small that rounding stays far below 1e-5.
_GAINS = {"q_proj": 1.7, "k_proj": 1.7, "lm_head": 0.3}


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))


def _llama_mha() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_TEXT, "num_key_value_heads": 4}))


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_TEXT, sliding_window=None))


def _qwen2() -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_TEXT, use_sliding_window=False))


def _qwen3() -> PreTrainedModel:
    # head_dim is a setting of its own here, and differs from hidden_size / num_attention_heads.
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_TEXT, head_dim=16))


def _llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next() -> PreTrainedModel:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_mha": _llama_mha,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "llava": _llava,
    "llava_next": _llava_next,
}
TEXT_MODELS = ("llama", "llama_mha", "mistral", "qwen2", "qwen3")
IMAGE_MODELS = ("llava", "llava_next")
MODELS = TEXT_MODELS + IMAGE_MODELS


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A new model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[name]()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    gain = next((gain for part, gain in _GAINS.items() if part in path), 1.0)
                    parameter.normal_(0.0, gain * (parameter.numel() // parameter.shape[0]) ** -0.5)
    return model.eval().to(dtype)


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model that compressed caches are made for."""
    return build(name, dtype, seed)


@functools.cache
def untouched(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The same model, never given to kvcompress."""
    return build(name, dtype, seed)


def token_ids(batch: int, tokens: int, seed: int) -> Tensor:
    """Random text tokens, none of them padding or an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, IMAGE_TOKEN, (batch, tokens), generator=generator)


def inputs(name: str, tokens: int, seed: int, batch: int = 1) -> dict[str, Any]:
    """Inputs for `generate` or a forward: text, and for image models an image of random pixels before its end."""
    ids = token_ids(batch, tokens, seed)
    if name in TEXT_MODELS:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (batch, 3, 8, 8) if name == "llava" else (batch, 5, 3, 8, 8)  # a base image and 2 x 2 tiles
    images: dict[str, Any] = {"pixel_values": torch.randn(shape, generator=generator)}
    count = 4  # patches of an 8 x 8 image
    if name == "llava_next":
        images["image_sizes"] = torch.tensor([[16, 16]] * batch)
        count += 4 * 4 + 4  # the tiles' patches, and the end of each row of them
    before = tokens // 2
    image = torch.full((batch, count), IMAGE_TOKEN)
    ids = torch.cat([ids[:, :before], image, ids[:, before:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
