"""A conversation of any length in one compressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.reuse.conversation import Conversation
from kvcompress.reuse.prompts import Prompter, answering
from kvcompress.reuse.wanted import check_generate, check_images, check_text


class Chat:
    """A conversation whose cache stays within its budget; nothing that was said is read twice.

    With a scorer that is made for it (the preset `kvzip`) the first turn is repeated once before it is answered, so
    that what is kept of it serves later questions as well as the first.

    Args:
        model: a model that a `CompressedCache` can serve.
        processor: its tokenizer, or for models that see images its processor.
        config: as for a `CompressedCache`.
        chat: whether the chat template goes around what is said; None for "if there is one".
        **overrides: fields of the configuration to replace, for instance `budget=512`.

    Raises:
        ConfigError: if the processor is none, or the configuration wrong.
        UnsupportedModelError: if the model cannot be served.

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
        self._said = Conversation(model)

    def report(self) -> CacheReport:
        """What is held of the conversation."""
        return self.cache.report()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.cache.reset()
        self._said = Conversation(self.model)

    def say(self, text: str, *, images: Sequence[Any] = (), max_new_tokens: int | None = None, **generate: Any) -> str:
        """Says something and gives the answer.

        After a call that was interrupted or failed on the way, the conversation has to begin anew (`reset`).

        Args:
            text: what the user says.
            images: PIL images, which come before the text.
            max_new_tokens: most tokens of the answer; None for what a `generation_config` says, or else 128.
            **generate: arguments of `generate`; greedy unless `do_sample` is among them. One row of tokens has to come
                of them, so beams, several answers and assistants are refused.

        Raises:
            ConfigError: if the text is empty or none, or an argument of `generate` does not go with a conversation.
            UnsupportedModeError: if the model cannot see images in this turn.
            CacheStateError: if an earlier call was interrupted or failed half-way.
        """
        check_text("text", text)
        check_images(images)
        own = check_generate(self.model, generate)
        new = self._prompter.turn(text, images, first=self._said.ids is None)
        self._said.check_images(len(images))
        if self.cache.get_seq_length() > self._said.tokens:
            raise CacheStateError("chat: an earlier answer was interrupted; call reset() for a new conversation")
        inputs = self._begun(self._said.joined(new, self._prompter.tokenizer.eos_token_id))
        wanted = answering(self._prompter, max_new_tokens, {**own, **generate})
        output: Tensor = self.model.generate(  # type: ignore[operator]
            **inputs, **cache_argument(self.cache), **wanted
        )
        self._said.take(inputs, output)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self._prompter.tokenizer.decode(answer, skip_special_tokens=True))

    def _begun(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is left to read once the first turn but its last token was repeated, for a scorer that wants that."""
        scorer, tokens = self.cache.config.scorer, inputs["input_ids"].shape[1]
        if self._said.ids is not None or tokens < 2 or scorer is None or not scorer.reconstructs:
            return inputs
        each = ("input_ids", "attention_mask")
        first = {name: given[:, :-1] if name in each else given for name, given in inputs.items()}
        self.cache.choose_for_questions(first)
        self.cache.score_by_reconstruction(self._prompter.tokenizer, first)
        return {name: inputs[name] for name in each}
