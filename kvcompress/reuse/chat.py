"""A conversation of any length in one compressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.reuse.prompts import Prompter, answering


class Chat:
    """A conversation whose cache stays within its budget; nothing that was said is read twice.

    Args:
        model: a model that a `CompressedCache` can serve.
        processor: its tokenizer, or for models that see images its processor.
        config: as for a `CompressedCache`.
        chat: whether the chat template goes around what is said; None for "if there is one".
        **overrides: fields of the configuration to replace, for instance `budget=512`.

    Example:
        >>> chat = Chat(model, tokenizer, "prefixkv", budget=0.5)
        >>> answers = [chat.say("the key is under the mat", max_new_tokens=4), chat.say("where is it?")]
        >>> chat.report().retention <= 0.5
        True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "auto",
        *,
        chat: bool | None = None,
        **overrides: Any,
    ) -> None:
        self.model, self._prompter = model, Prompter(model, processor, chat)
        self.cache = CompressedCache(model, config, **overrides)
        self._ids: Tensor | None = None

    def report(self) -> CacheReport:
        """What is held of the conversation."""
        return self.cache.report()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.cache.reset()
        self._ids = None

    def say(self, text: str, *, images: Sequence[Any] = (), max_new_tokens: int = 128, **generate: Any) -> str:
        """Says something and gives the answer.

        After a call that was interrupted or failed on the way, the conversation has to begin anew (`reset`).

        Args:
            text: what the user says.
            images: PIL images, which come before the text.
            max_new_tokens: most tokens of the answer.
            **generate: arguments of `generate`; greedy unless `do_sample` is among them.

        Raises:
            ConfigError: if the text is empty.
            CacheStateError: if an earlier call was interrupted or failed half-way.
        """
        inputs = self._prompter.turn(text, images, first=self._ids is None)
        if self.cache.get_seq_length() > (0 if self._ids is None else self._ids.shape[1]):
            raise CacheStateError("chat: an earlier answer was interrupted; call reset() for a new conversation")
        if self._ids is not None:
            inputs["input_ids"] = _joined(self._ids, inputs["input_ids"], self._prompter.tokenizer.eos_token_id)
        ids = inputs["input_ids"]
        inputs["attention_mask"] = torch.ones_like(ids)
        wanted = answering(self._prompter, {"max_new_tokens": max_new_tokens, **generate})
        output: Tensor = self.model.generate(  # type: ignore[operator]
            **inputs, **cache_argument(self.cache), **wanted
        )
        self._ids = output
        return str(self._prompter.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _joined(said: Tensor, new: Tensor, end: int | None) -> Tensor:
    """What was said and what comes; the end of an answer is there once, whoever wrote it."""
    twice = end is not None and int(said[0, -1]) == end and new.shape[1] > 0 and int(new[0, 0]) == end
    return torch.cat([said.to(new.device), new[:, 1:] if twice else new], 1)
