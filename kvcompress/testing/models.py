"""Tiny models with random weights and the true architecture, and tokens for them."""

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
IMAGE_TOKENS = 36  # of an image of the LLaVA with 24 x 24 pixels
TEXT: dict[str, Any] = {
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
VISION: dict[str, Any] = {
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


def llama(layers: int = 3) -> PreTrainedModel:
    """A LLaMA with two key/value heads for four query heads; its weights are what transformers starts with."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": layers}))


def llava(image_size: int = 8, layers: int = 3) -> PreTrainedModel:
    """A LLaVA around such a LLaMA: a patch has 4 x 4 pixels."""
    config = transformers.LlavaConfig(  # type: ignore[call-arg]
        vision_config=transformers.CLIPVisionConfig(**{**VISION, "image_size": image_size}),
        text_config=transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": layers}),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def randomised(
    build: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A new model whose weights follow from the seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    gain = next((gain for part, gain in _GAINS.items() if part in path), 1.0)
                    parameter.normal_(0.0, gain * (parameter.numel() // parameter.shape[0]) ** -0.5)
    return model.eval().to(dtype)  # type: ignore[no-any-return, no-untyped-call]


@functools.cache
def model(sees_images: bool = False) -> PreTrainedModel:
    """The model that compressed caches are made for: a LLaMA, or a LLaVA with 6 x 6 features an image."""
    return randomised(functools.partial(llava, 24) if sees_images else llama)


def token_ids(batch: int, tokens: int, seed: int) -> Tensor:
    """Random text tokens, none of them padding or an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, IMAGE_TOKEN, (batch, tokens), generator=generator)


def pixels(number: int, seed: int) -> dict[str, Tensor]:
    """So many images of random pixels for the LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(number, 3, 24, 24, generator=generator)}


def with_images(ids: Tensor, number: int) -> Tensor:
    """A row with so many images in its midst, and text between them."""
    image = torch.tensor([IMAGE_TOKEN] * IMAGE_TOKENS + [7])
    return torch.cat([ids[: len(ids) // 2], *[image] * number, ids[len(ids) // 2 :]])
