"""A sample as a model's input: the prompt with its image, and the tokens of its reference answer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.evaluation.data.sample import TEXT, Sample
from kvcompress.evaluation.generation import chat_messages, encode_prompt
from kvcompress.evaluation.models import LoadedModel


def encode_sample(loaded: LoadedModel, sample: Sample) -> dict[str, Tensor]:
    """Turns the prompt and image of a sample into a model's input, on the model's device.

    A chat template goes around the prompt where there is one, except around plain text. The beginning of an answer, if
    the sample has one, stands at the end.

    Raises:
        ConfigError: if the prompt is empty or the image cannot be read.
        UnsupportedModelError: if there is an image and the model sees none.
    """
    picture = sample.open_picture() if loaded.sees_images else sample.picture or sample.image
    inputs = encode_prompt(loaded, sample.prompt, image=picture, chat=chat_of(sample))
    return followed_by(loaded, inputs, begun_answer(loaded, sample))


def followed_by(loaded: LoadedModel, inputs: dict[str, Tensor], text: str) -> dict[str, Tensor]:
    """Inputs of one row with more text at their end, tokenized by itself."""
    if not text:
        return inputs
    ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False).input_ids], device=loaded.model.device)
    whole = torch.cat([inputs["input_ids"], ids], 1)
    kinds = inputs.get("mm_token_type_ids")  # of an image or not
    more = {} if kinds is None else {"mm_token_type_ids": torch.cat([kinds, torch.zeros_like(ids).to(kinds)], 1)}
    return {**inputs, **more, "input_ids": whole, "attention_mask": torch.ones_like(whole)}


def begun_answer(loaded: LoadedModel, sample: Sample) -> str:
    """What stands before the model's own words: the answer's prefix, parted from the prompt as an answer is."""
    if not sample.answer_prefix:
        return ""
    return _between(loaded, sample, sample.answer_prefix)[1]


def answer_ids(loaded: LoadedModel, sample: Sample) -> Int[Tensor, "1 tokens"]:
    """Tokens of the reference answer as they follow the prompt, without an end-of-turn token; on the model's device.

    What the chat template puts between prompt and answer (LLaVA's: a space) belongs to them; without a template a
    space does, unless there is white space already.

    Raises:
        ConfigError: if the sample has no answer, or an empty one.
    """
    if not (sample.answer or "").strip():
        raise ConfigError(f"sample '{sample.name}': its reference answer is empty")
    before, after = _between(loaded, sample, sample.answer or "")
    if sample.answer_prefix:
        before += begun_answer(loaded, sample)
        after = after.lstrip() if before[-1].isspace() else f" {after.lstrip()}"
    tokenizer: Any = loaded.tokenizer
    special = chat_of(sample) is False or getattr(reader_of(loaded), "chat_template", None) is None
    prompt = tokenizer(before, add_special_tokens=special).input_ids
    both = tokenizer(before + after, add_special_tokens=special).input_ids
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        ids = both[len(prompt) :]
    else:  # the last word of the prompt and the first of the answer share a token, or an end token follows
        ids = tokenizer(after, add_special_tokens=False).input_ids
    return torch.tensor([ids], device=loaded.model.device)


def _between(loaded: LoadedModel, sample: Sample, answer: str) -> tuple[str, str]:
    """The prompt as the model reads it, and an answer with what stands between."""
    reader = reader_of(loaded)
    if getattr(reader, "chat_template", None) is None or chat_of(sample) is False:
        between = "" if sample.prompt[-1:].isspace() or answer[:1].isspace() else " "
        return sample.prompt, between + answer
    asked = chat_messages(loaded, sample.prompt, sample.picture or sample.image)
    before = str(reader.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    content: Any = [{"type": "text", "text": answer}] if loaded.sees_images else answer
    whole = str(reader.apply_chat_template([*asked, {"role": "assistant", "content": content}], tokenize=False))
    rest = whole[len(before) :] if whole.startswith(before) else ""
    return before, rest[: len(rest) - len(rest.lstrip())] + answer.lstrip()


def reader_of(loaded: LoadedModel) -> Any:
    """What turns text, and images if the model sees any, into its input."""
    return loaded.processor if loaded.processor is not None else loaded.tokenizer


def chat_of(sample: Sample) -> bool | None:
    """Whether the chat template goes around a sample; None for "if there is one"."""
    return False if sample.kind == TEXT else None
