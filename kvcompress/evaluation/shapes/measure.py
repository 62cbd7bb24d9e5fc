"""How well a model answers questions about scenes, with any cache, and how unequal importance is among their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.evaluation.inequality import gini
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.shapes.questions import KINDS, Question, ask, describe_question, right_objects
from kvcompress.evaluation.shapes.scenes import Scene, draw_scene, sample_scene, scene_seed
from kvcompress.reuse.encoded import model_inputs

_LONGEST = {"description": 72}  # tokens of an answer
_SHORT = 6


def held_out_scenes(count: int, split: str = "test") -> list[Scene]:
    """The first scenes of a split that no training saw."""
    return [sample_scene(scene_seed(split, index)) for index in range(count)]


def accuracy(
    loaded: LoadedModel,
    config: CompressionConfig | None,
    scenes: Sequence[Scene],
    kinds: Sequence[str] = (*KINDS, "description"),
    batch: int = 25,
) -> dict[str, float]:
    """Share of right answers of each kind, one question of each kind a scene, greedy, each as a dialogue's first.

    Args:
        loaded: ShapesLLaVA.
        config: how the cache is compressed; None for transformers' own cache.
        scenes: what is asked about.
        kinds: of questions; "description" gives the share of the scenes' objects that are described rightly, each in
            its place with all its attributes. The others count answers that are right to the letter.
        batch: questions at a time.
    """
    found: dict[str, float] = {}
    for kind in kinds:
        asked = [(scene, question) for scene in scenes if (question := _ask(scene, kind)) is not None]
        right = total = 0
        for part in _batches(asked, batch):
            answers = answer(loaded, config, part, _LONGEST.get(kind, _SHORT))
            for text, (scene, question) in zip(answers, part, strict=True):
                described = kind == "description"
                right += right_objects(text, scene) if described else text.strip() == question.answer
                total += len(scene.things) if described else 1
        found[kind] = right / max(1, total)
    return found


def answer(
    loaded: LoadedModel,
    config: CompressionConfig | None,
    asked: Sequence[tuple[Scene, Question]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to questions about scenes, all in one batch."""
    inputs = encode(loaded, asked)
    output = loaded.model.generate(  # type: ignore[operator]
        **inputs,
        **cache_argument(_cache(loaded, config)),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    texts = loaded.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(text) for text in texts]


@torch.inference_mode()
def description_perplexity(
    loaded: LoadedModel, config: CompressionConfig | None, scenes: Sequence[Scene], batch: int = 25
) -> float:
    """Perplexity of the right descriptions, read token by token as a model would write them."""
    total, count = 0.0, 0
    for part in _batches([(scene, describe_question(scene)) for scene in scenes], batch):
        inputs = encode(loaded, part)
        texts = [question.answer for _, question in part]
        ends = [[*loaded.tokenizer(text, add_special_tokens=False).input_ids, _end(loaded)] for text in texts]
        longest = max(map(len, ends))
        answers = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in ends], device=loaded.model.device)
        for logits, wanted in zip(_read(loaded, config, inputs, answers), answers.T, strict=True):
            total += functional.cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="sum").item()
        count += sum(map(len, ends))
    return math.exp(total / count)


@torch.inference_mode()
def gini_per_layer(loaded: LoadedModel, scenes: Sequence[Scene]) -> list[float]:
    """How unequal importance is within each layer: 0 where all tokens are alike, towards 1 where few have all of it.

    Importance is attention probability after a prompt that asks for a description, averaged over heads and summed over
    queries, as PrefixKV reads it.
    """
    decoder = loaded.model.get_decoder()  # type: ignore[no-untyped-call]
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        inputs = encode(loaded, [(scene, describe_question(scene)) for scene in scenes])
        attentions = loaded.model(**inputs, output_attentions=True).attentions
    finally:
        decoder.set_attn_implementation(before)
    return [gini(layer.float().mean(dim=1).sum(dim=1)) for layer in attentions]


def encode(loaded: LoadedModel, asked: Sequence[tuple[Scene, Question]]) -> dict[str, Tensor]:
    """Questions about scenes as a model's input, padded on the left."""
    processor: Any = loaded.processor
    texts = []
    for _, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    images = [draw_scene(scene) for scene, _ in asked]
    encoded = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return model_inputs(loaded.model, encoded)


def _read(
    loaded: LoadedModel, config: CompressionConfig | None, inputs: dict[str, Tensor], answers: Tensor
) -> Iterator[Tensor]:
    """Logits before each token of the answers."""
    cache, mask = _cache(loaded, config), inputs["attention_mask"]
    yield loaded.model(**inputs, **cache_argument(cache), logits_to_keep=1).logits[:, -1]
    for column in answers.clamp(min=0).T[:-1]:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = mask.sum(dim=1, keepdim=True) - 1
        step = {"input_ids": column[:, None], "attention_mask": mask, "position_ids": position}
        yield loaded.model(**step, **cache_argument(cache)).logits[:, -1]


def _ask(scene: Scene, kind: str) -> Question | None:
    return describe_question(scene) if kind == "description" else ask(scene, kind, 0)


def _cache(loaded: LoadedModel, config: CompressionConfig | None) -> Cache:
    if config is None:
        return DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
    return CompressedCache(loaded.model, config)


def _end(loaded: LoadedModel) -> int:
    return int(loaded.tokenizer.eos_token_id)


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))
