"""Tiny checkpoints in folders, as a model hub would give them: random weights, a byte tokenizer, an image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<image>")
TEXT_CHAT = "{% for m in messages %}U:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
IMAGE_CHAT = (
    "{% for m in messages %}U:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # so that an answer has as many tokens as asked for
    "tie_word_embeddings": False,
}


def text_tokenizer(chat_template: str | None = TEXT_CHAT) -> PreTrainedTokenizerBase:
    """One token a byte."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = chat_template
    return fast


def text_model() -> PreTrainedModel:
    """A LLaMA of three layers whose attention is far from uniform."""
    return _with_weights(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_TEXT))


def save_text(folder: Path, chat_template: str | None = TEXT_CHAT) -> Path:
    """Saves the LLaMA and its tokenizer."""
    text_model().save_pretrained(folder)
    text_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_image(folder: Path, chat_template: str | None = IMAGE_CHAT) -> Path:
    """Saves a LLaVA that sees images of 8 x 8 pixels as four tokens, and its processor."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
    )
    _with_weights(transformers.LlavaForConditionalGeneration, config).save_pretrained(folder)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
        tokenizer=text_tokenizer(None),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def _with_weights(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 1.7 * parameter.shape[-1] ** -0.5)
    return model.eval()
