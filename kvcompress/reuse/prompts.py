"""Prompts in pieces, each tokenized by itself, so that what a cache has seen stays the start of what comes next."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import ConfigError, UnsupportedModelError
from kvcompress.integrations import adapter_for
from kvcompress.reuse.encoded import model_inputs
from kvcompress.reuse.wanted import check_processor

_MOST = 128  # tokens of an answer
_MARK = "@@kvcompress-mark@@"  # stands for what is not known yet while a template is filled in


class Prompter:
    """Writes prompts for a model with its own chat template, or plainly where it has none.

    Args:
        model: the model.
        processor: its tokenizer, or for models that see images its processor.
        chat: whether the chat template goes around; None for "if there is one".

    Raises:
        ConfigError: if the processor is none, or a chat template is asked for where there is none.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, chat: bool | None = None) -> None:
        check_processor(processor)
        self.model, self.processor = model, processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.sees_images = adapter_for(model).sees_images and self.tokenizer is not processor
        template = getattr(processor, "chat_template", None)
        if chat and template is None:
            raise ConfigError("chat: the processor has no chat template; leave chat out or turn it off")
        self.chat = template is not None and chat is not False

    @property
    def padding(self) -> int:
        """The token that fills up short rows."""
        known = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if known is None else known)

    def document(self, text: str | None, images: Sequence[Any]) -> tuple[dict[str, Tensor], str]:
        """A prompt up to where a question comes, and what stands after the question.

        Args:
            text: what the questions are about; None for images alone.
            images: PIL images, which come before the text.

        Returns:
            Inputs of one row for the model, and the text after a question.

        Raises:
            ConfigError: if there is neither text nor image.
            UnsupportedModelError: if there are images and the model sees none.
        """
        self._check_images(images)
        if not images and not (text or "").strip():
            raise ConfigError("document: is empty; give text, images or both")
        said = f"{text.strip()}\n\n{_MARK}" if text else _MARK
        if not self.chat:
            token = getattr(self.processor, "image_token", "")
            return self.encoded(said.partition(_MARK)[0], images, lead=f"{token}\n" * len(images)), ""
        before, after = self._filled([self._message("user", said, len(images))])
        return self.encoded(before, images), after

    def turn(self, text: str, images: Sequence[Any], first: bool) -> dict[str, Tensor]:
        """What comes next in a conversation: from the end of the last answer to the start of the next.

        Args:
            text: what the user says.
            images: PIL images, which come before the text.
            first: whether nothing was said before.

        Returns:
            Inputs of one row for the model.

        Raises:
            ConfigError: if the text is empty.
            UnsupportedModelError: if there are images and the model sees none.
        """
        if not text.strip():
            raise ConfigError("message: is empty")
        self._check_images(images)
        if not self.chat:
            token = getattr(self.processor, "image_token", "")
            whole = f"{token}\n" * len(images) + text
            return self.encoded(whole if first else f"\n{whole}", images, special=first)
        own = self._message("user", text, len(images))
        if first:
            whole = self._rendered([own])
        else:
            whole = self._filled([self._message("user", "?", 0), self._message("assistant", _MARK, 0), own])[1]
        return self.encoded(whole, images, special=first)

    def encoded(self, text: str, images: Sequence[Any], *, lead: str = "", special: bool = True) -> dict[str, Tensor]:
        """Inputs of one row, on the model's device.

        Args:
            text: the text.
            images: PIL images, for whose tokens the text has places.
            lead: what goes before it.
            special: whether the tokenizer may add the tokens that begin a text, where the template has not.
        """
        whole, begins = lead + text, getattr(self.tokenizer, "bos_token", None)
        special = special and not (self.chat and (self.tokenizer is self.processor or _starts(whole, begins)))
        wanted: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": special}
        if images:
            encoded = self.processor(images=list(images), text=whole, **wanted)
        else:
            encoded = self.tokenizer(whole, **wanted)
        return model_inputs(self.model, encoded)

    def questions(self, questions: Sequence[str], after: str) -> tuple[Tensor, Tensor]:
        """Ids of questions, padded on the left, and which of them are tokens."""
        rows = [self.tokenizer(question + after, add_special_tokens=False).input_ids for question in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.padding] * (longest - len(row)) + row for row in rows], dtype=torch.long)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
        return ids.to(self.model.device), mask.to(self.model.device)

    def vocabulary(self) -> str:
        """SHA-256 of the tokenizer's vocabulary."""
        words = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _check_images(self, images: Sequence[Any]) -> None:
        if images and not self.sees_images:
            kind = type(self.processor).__name__
            raise UnsupportedModelError(
                f"images: need a LLaVA model and its processor (AutoProcessor.from_pretrained); got a {kind} for "
                f"{type(self.model).__name__}"
            )

    def _message(self, role: str, text: str, images: int) -> dict[str, Any]:
        if self.tokenizer is self.processor:
            return {"role": role, "content": text}
        return {"role": role, "content": [*([{"type": "image"}] * images), {"type": "text", "text": text}]}

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _filled(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        before, found, after = self._rendered(messages).partition(_MARK)
        if not found:
            raise ConfigError("chat: the chat template changes what it is given; pass chat=False")
        return before, after


def _starts(text: str, begin: str | None) -> bool:
    return begin is not None and text.startswith(begin)


def answering(prompter: Prompter, max_new_tokens: int | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for an answer: greedy unless something else is asked for.

    Args:
        prompter: knows what fills up short rows.
        max_new_tokens: most tokens of an answer; None for what a generation configuration says, or else 128.
        given: other arguments, a `generation_config` among them or not.
    """
    config = given.get("generation_config")
    most = getattr(config, "max_new_tokens", None) if max_new_tokens is None else max_new_tokens
    wanted = {"pad_token_id": prompter.padding, "max_length": None, "max_new_tokens": _MOST if most is None else most}
    if config is None:
        greedy = {} if "do_sample" in given else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {**wanted, **greedy, **given}
    whole = copy.deepcopy(config)
    wanted |= {"do_sample": bool(config.do_sample), **given}
    del wanted["generation_config"]
    return {"generation_config": whole, **whole.update(**wanted)}
