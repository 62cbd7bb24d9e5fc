"""ShapesLLaVA's architecture and processor, before training."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kvcompress.evaluation.shapes.questions import PLACES, WORDS
from kvcompress.evaluation.shapes.scenes import IMAGE_SIZE

PATCH = 12  # pixels, each way: 12 x 12 = 144 vision tokens an image
VISION_TOKENS = (IMAGE_SIZE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
_LONGEST = 1024  # tokens of a dialogue
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER:{% else %}ASSISTANT:{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word or mark; what is no word of a question or answer is `<unk>`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##"), decoders.Replace(" :", ":")])
    # one token each, though they end with a mark; not normalised, so that case matters
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(place, normalized=True, single_word=True) for place in PLACES])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=_LONGEST,
    )


def build_processor() -> LlavaProcessor:
    """Joins an image of any size (it is scaled to `IMAGE_SIZE`) with text in LLaVA's way."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained model; the random state outside stays as it was.

    Matrices start at a scale that keeps the size of what they multiply, and those that write to the residual stream
    smaller, as suits a model this narrow.
    """
    vision: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    text: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": _LONGEST,
        "pad_token_id": SPECIAL.index("<pad>"),
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "tie_word_embeddings": False,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        depth = {"vision_tower": 4, "language_model": 8}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim < 2:
                    continue
                fan_in = parameter[0].numel()
                gain = 1.0
                if any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2")):
                    gain = next((1 / (2 * layers) ** 0.5 for part, layers in depth.items() if part in name), 1.0)
                if "embed" in name and "patch" not in name:
                    parameter.normal_(0.0, 0.5)
                elif "lm_head" in name:
                    parameter.normal_(0.0, 0.2 * fan_in**-0.5)
                else:
                    parameter.normal_(0.0, gain * fan_in**-0.5)
    return model
