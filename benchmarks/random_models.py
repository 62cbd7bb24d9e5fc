"""Models with the shapes of well-known ones and random weights, which cost as much time as trained ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

# Of LLaMA-7B, which LLaVA-1.5-7B is built on, and of LLaMA-3.1-8B.
_HEADS: dict[str, dict[str, int]] = {
    "mha": {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064},
    "gqa": {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
}
_DECODER: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that every row generates as many tokens as asked for
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "image_size": 336,
    "patch_size": 14,
}
# Small enough for a CPU to run through everything.
_TINY_DECODER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 4096}
_TINY_HEADS = {"mha": {"num_key_value_heads": 4}, "gqa": {"num_key_value_heads": 2}}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_IMAGE = {"projection_dim": 32, "image_size": 48, "patch_size": 8}


@functools.lru_cache(maxsize=1)  # two of them would not leave room for the caches
def of_kind(kind: str, device: torch.device, tiny: bool = False) -> PreTrainedModel:
    """A model in bfloat16.

    Args:
        kind: "mha" or "gqa" for a LLaMA; "llava" for a LLaVA-1.5, of 576 image tokens, or 36 if it is tiny.
        device: where it is made.
        tiny: whether it has a few small layers.
    """
    if kind == "llava":
        return _made(transformers.LlavaForConditionalGeneration, _llava(tiny), device)
    return _made(transformers.LlamaForCausalLM, _decoder(kind, tiny), device)


def _llava(tiny: bool) -> transformers.LlavaConfig:
    decoder = _decoder("mha", tiny)
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**(_TOWER | (_TINY_TOWER | _TINY_IMAGE if tiny else {}))),
        text_config=decoder,
        image_token_id=decoder.vocab_size - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _decoder(kind: str, tiny: bool) -> transformers.LlamaConfig:
    small: dict[str, Any] = {"intermediate_size": 128, "vocab_size": 500}
    shape = _DECODER | _HEADS[kind]
    return transformers.LlamaConfig(**(shape | _TINY_DECODER | small | _TINY_HEADS[kind] if tiny else shape))


def _made(kind: Any, config: Any, device: torch.device) -> PreTrainedModel:
    default = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(devices=devices), device:
            torch.manual_seed(0)
            model: PreTrainedModel = kind(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()
