"""PagesLLaVA: a small vision tower and LLaVA's projector in front of SmolLM2-135M-Instruct, which stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from kvcompress.errors import MissingDependencyError
from kvcompress.evaluation import smollm2
from kvcompress.evaluation.pages.contents import CELLS, LOOKS
from kvcompress.evaluation.pages.drawing import IMAGE_SIZE, PATCH

NAME = "pages"
IMAGE_TOKEN = "<image>"
_FOLDER = Path(__file__).parent / "weights"
CHAT_TEMPLATE = (  # SmolLM2's own, with images before the text of a message
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Puts the trained tower and projector in front of SmolLM2's weights.

    Args:
        dtype: of the weights.

    Raises:
        MissingDependencyError: if SmolLM2's package is not installed, or this copy of the package came without weights.
    """
    weights = weights_file()
    text, tokenizer = smollm2.load(dtype)
    return merged(text, load_file(weights), dtype), build_processor(tokenizer)


def weights_file() -> Path:
    """What was trained: `vision_tower.*` and `multi_modal_projector.*`, float16.

    Raises:
        MissingDependencyError: if this copy of the package came without it.
    """
    file = _FOLDER / "model.safetensors"
    if not file.is_file():
        raise MissingDependencyError(
            f"model {NAME}: this copy of kvcompress lacks its weights ({_FOLDER}): install it again, or train them "
            "with examples/train_pages_llava.py"
        )
    return file


def merged(text: Any, trained: dict[str, Tensor], dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA of a language model's weights, which are copied, and of what was trained."""
    config = build_config(text.config)
    state = {f"model.language_model.{name}": weight for name, weight in text.model.state_dict().items()}
    rows = state["model.language_model.embed_tokens.weight"]
    state["model.language_model.embed_tokens.weight"] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    state |= {f"model.{name}": weight.to(dtype) for name, weight in trained.items()}
    if not config.tie_word_embeddings:
        head = text.lm_head.weight
        state["lm_head.weight"] = torch.cat([head, head.new_zeros(1, head.shape[1])])
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, trust_remote_code=False
    )
    model.generation_config = copy.deepcopy(text.generation_config)
    model.eval()
    return model  # type: ignore[no-any-return]


def build_config(text: LlamaConfig) -> LlavaConfig:
    """LLaVA's configuration for a language model, which gets one token more: the last, for images."""
    vision: dict[str, Any] = {
        "hidden_size": text.hidden_size,
        "intermediate_size": 2 * len(LOOKS),
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "projection_dim": text.hidden_size,
    }
    own = LlamaConfig(**{**text.to_dict(), "vocab_size": text.vocab_size + 1})
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=own,
        image_token_index=text.vocab_size,
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Joins a page (an image of another size is scaled) with text in LLaVA's way; the tokenizer is copied."""
    own: Any = copy.deepcopy(tokenizer)
    own.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size),
        tokenizer=own,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
