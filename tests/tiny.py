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
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.testing.models import IMAGE_TOKEN, TEXT, VISION, llama, llava, randomised, token_ids
from tests import families

# What the installed transformers calls the argument that takes a cache.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def _llama_mha() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 4}))


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=None))


def _qwen2() -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, use_sliding_window=False))


def _qwen3() -> PreTrainedModel:
    # head_dim is a setting of its own here, and differs from hidden_size / num_attention_heads.
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, head_dim=16))


def _llava_pixtral() -> PreTrainedModel:
    """A LLaVA whose tower takes images of any size; its processor ends each row of an image with a token."""
    tower = {**VISION, "image_size": 64, "intermediate_size": 24}
    del tower["projection_dim"]
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**tower),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next(image_size: int = 8, layers: int = 3) -> PreTrainedModel:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**{**VISION, "image_size": image_size}),
        text_config=transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": layers}),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[h * image_size, w * image_size] for h, w in ((1, 2), (2, 1), (2, 2))],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama_shallow": functools.partial(llama, 2),
    "llama_mha": _llama_mha,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "llava": llava,
    "llava_next": _llava_next,
    "llava_pixtral": _llava_pixtral,
    "llava_36": functools.partial(llava, 24),
    "llava_next_36": functools.partial(_llava_next, 24),
    "llava_deep": functools.partial(llava, 24, 6),
    **{name: functools.partial(families.build, name, TEXT) for name in families.EVERY},
}
TEXT_MODELS = ("llama", "llama_mha", "mistral", "qwen2", "qwen3")
IMAGE_MODELS = ("llava", "llava_next")
MODELS = TEXT_MODELS + IMAGE_MODELS
LARGE_IMAGE_MODELS = ("llava_36", "llava_next_36")  # 6 x 6 features an image or tile: reducers find something to do


def add(name: str, builder: Callable[[], PreTrainedModel]) -> None:
    """Makes another tiny model known by a name."""
    _BUILDERS[name] = builder


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A new model; the global random state is left as it was."""
    return randomised(_BUILDERS[name], dtype, seed)


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model that compressed caches are made for."""
    return build(name, dtype, seed)


@functools.cache
def untouched(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The same model, never given to kvcompress."""
    return build(name, dtype, seed)


def with_cache(cache: object) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model or to `generate`."""
    return {CACHE: cache}


def image_side(name: str) -> int:
    """Pixels along a side of one image, or of one tile."""
    return 8 if name in IMAGE_MODELS else 24


def image_tokens(name: str) -> int:
    """Tokens of one image: a patch has 4 x 4 pixels; LLaVA-NeXT adds 2 x 2 tiles and the end of each row of them."""
    side = image_side(name) // 4
    return side**2 if "next" not in name else side**2 + 2 * side * (2 * side + 1)


def images(name: str, number: int, seed: int) -> dict[str, Tensor]:
    """So many images of random pixels."""
    generator, side = torch.Generator().manual_seed(seed), image_side(name)
    if "next" not in name:
        return {"pixel_values": torch.randn(number, 3, side, side, generator=generator)}
    pixels = torch.randn(number, 5, 3, side, side, generator=generator)  # a base image and 2 x 2 tiles
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * side, 2 * side]] * number)}


def inputs(name: str, tokens: int, seed: int, batch: int = 1) -> dict[str, Any]:
    """Inputs for `generate` or a forward: text, and for image models an image of random pixels before its end."""
    ids = token_ids(batch, tokens, seed)
    if name in TEXT_MODELS or name in families.EVERY:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = tokens // 2
    image = torch.full((batch, image_tokens(name)), IMAGE_TOKEN)
    ids = torch.cat([ids[:, :before], image, ids[:, before:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(name, batch, seed + 1)}


def prompt(name: str, parts: list[int], seed: int) -> dict[str, Any]:
    """A row of several parts: so many random text tokens each, or an image where the number is 0."""
    ids, number = [], parts.count(0)
    for place, count in enumerate(parts):
        text = token_ids(1, count, seed + 7 * place)
        ids.append(text if count else torch.full((1, image_tokens(name)), IMAGE_TOKEN))
    joined = torch.cat(ids, 1)
    found = images(name, number, seed + 1) if number else {}
    return {"input_ids": joined, "attention_mask": torch.ones_like(joined), **found}
