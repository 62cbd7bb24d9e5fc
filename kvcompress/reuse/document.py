"""A document that is read and compressed once, and asked any number of questions."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache, loading
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.files import path_of
from kvcompress.progress import progress_bar
from kvcompress.reuse.prompts import Prompter, answering
from kvcompress.reuse.wanted import check_count, check_generate, check_images, check_streamer, check_text, check_texts


class Document:
    """Text, images or both, in a compressed cache; questions are answered on copies of it.

    The document is compressed by itself, before any question is known, so that what is kept serves every question
    alike. So it is compressed by `kvzip` unless something else is asked for: the model repeats the document, text and
    images, and what that looks at is kept; reading takes two to three times as long. Policies that look at the last
    tokens of a prompt (`snapkv`, `tova`, `text`) see the document's end there. Short documents, and models that cannot
    repeat, are compressed as `auto` compresses any prompt.

    Args:
        model: a model that a `CompressedCache` can serve.
        processor: its tokenizer, or for models that see images its processor.
        text: what the questions are about.
        images: PIL images, which come before the text.
        config: as for a `CompressedCache`: a preset's name, a configuration, a dict or a path.
        chat: whether the chat template goes around document and question; None for "if there is one".
        **overrides: fields of the configuration to replace, for instance `budget=0.2`.

    Raises:
        ConfigError: if the document is empty or no text, the processor none, or the configuration wrong.
        UnsupportedModelError: if the model cannot be served, or there are images and it sees none.

    Example:
        >>> document = Document(model, tokenizer, "the key is under the mat", config="prefixkv", budget=0.5)
        >>> len(document.ask(["where is the key?", "what is under the mat?"], max_new_tokens=4))
        2
        >>> document.save(folder / "note")
        >>> Document.load(model, tokenizer, folder / "note").tokens == document.tokens
        True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        text: str | None = None,
        *,
        images: Sequence[Any] = (),
        config: str | PathLike[str] | dict[str, Any] | CompressionConfig = "auto",
        chat: bool | None = None,
        **overrides: Any,
    ) -> None:
        self.model, self._prompter = model, Prompter(model, processor, chat)
        check_text("text", text, optional=True)
        check_images(images)
        inputs, self._after = self._prompter.document(text, images)
        self.cache = CompressedCache(model, config, **overrides)
        self._ids = inputs["input_ids"]
        self.cache.choose_for_questions(inputs)
        scorer = self.config.scorer
        if scorer is not None and scorer.reconstructs:
            self.cache.score_by_reconstruction(self._prompter.tokenizer, inputs)
        else:
            with torch.no_grad():
                model(**inputs, **cache_argument(self.cache), logits_to_keep=1)

    def __repr__(self) -> str:
        return f"Document({self.tokens:,} tokens, retention {self.report().retention:.1%})"

    @property
    def config(self) -> CompressionConfig:
        """How it is compressed."""
        return self.cache.config

    @property
    def tokens(self) -> int:
        """Tokens that were read, those of images included."""
        return self._ids.shape[1]

    def report(self) -> CacheReport:
        """What is held of it."""
        return self.cache.report()

    @overload
    def ask(
        self,
        questions: str,
        *,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        progress: bool = ...,
        **generate: Any,
    ) -> str: ...

    @overload
    def ask(
        self,
        questions: Sequence[str],
        *,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        progress: bool = ...,
        **generate: Any,
    ) -> list[str]: ...

    def ask(
        self,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
        **generate: Any,
    ) -> str | list[str]:
        """Answers questions, each as if it were the only one; the document stays as it is.

        Args:
            questions: one, or several.
            max_new_tokens: most tokens of an answer; None for what a `generation_config` says, or else 128.
            batch_size: questions that are answered at a time, each with a copy of the cache. Those of one token are
                apart, and where the cache `counts_padding` those of different lengths, so that each is answered as if
                it were the only one.
            progress: whether a bar on stderr shows how many are answered.
            **generate: arguments of `generate`; greedy unless `do_sample` is among them. One row of tokens has to come
                of them for each question, so beams, several answers and assistants are refused.

        Returns:
            One answer for one question, a list in their order for several.

        Raises:
            ConfigError: if a question is empty or no text, or an argument does not go with questions.
        """
        generate = {**check_generate(self.model, generate), **generate}
        several = check_texts("questions", [questions] if isinstance(questions, str) else questions)
        check_streamer(generate.get("streamer"), min(check_count("batch_size", batch_size), len(several)))
        if not all(question.strip() for question in several):
            raise ConfigError("questions: one of them is empty; ask something")
        wanted = answering(self._prompter, max_new_tokens, generate)
        answers: dict[int, str] = {}
        with progress_bar(progress, "questions", len(several)) as tell:
            for group in self._as_alone(self._prompter.questions(several, self._after)[1]) if several else ():
                for first in range(0, len(group), batch_size):
                    numbers = group[first : first + batch_size]
                    answers |= zip(numbers, self._answer([several[number] for number in numbers], wanted), strict=True)
                    tell(len(answers))
        found = [answers[number] for number in range(len(several))]
        return found[0] if isinstance(questions, str) else found

    def prepare(
        self, questions: Sequence[str], *, answer_prefix: str = ""
    ) -> tuple[dict[str, Tensor], CompressedCache]:
        """What `generate` takes to answer questions together, for calls that `ask` does not make.

        Args:
            questions: at least one.
            answer_prefix: what every answer begins with, put into the model's mouth.

        Returns:
            `input_ids` and `attention_mask` of document and questions, int64 [questions, tokens], padded between the
            two; and a copy of the cache, which has read the document and has a row for each question.

        Raises:
            ConfigError: if there is no question, one is empty or no text, or the answer to one would depend on the
                others: questions of one token are apart from longer ones, and where the cache `counts_padding`, all
                have as many tokens.
        """
        questions, after = check_texts("questions", questions), self._after + answer_prefix
        if not questions or not all(question + after for question in questions):
            raise ConfigError("questions: there is none, or one of them is empty; give at least one, and ask something")
        ids, mask = self._prompter.questions(questions, after)
        if len(self._as_alone(mask)) > 1:
            raise ConfigError(
                f"questions: {len(questions)} of different lengths would not be answered as each alone, since padding "
                "between document and question counts in layers that keep a window or a state, and one token alone is "
                "a decode step; prepare them one by one, or use ask, which puts together what goes together"
            )
        rows, read = len(questions), self._ids.to(ids.device)
        cache = copy.deepcopy(self.cache)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        whole = torch.cat([read.expand(rows, -1), ids], 1)
        return {
            "input_ids": whole,
            "attention_mask": torch.cat([torch.ones_like(read).expand(rows, -1), mask], 1),
        }, cache

    def _as_alone(self, mask: Tensor) -> list[list[int]]:
        """Numbers of the questions, by their mask, of which each is answered with the others as it would be alone."""
        groups: dict[int, list[int]] = defaultdict(list)
        for number, tokens in enumerate(mask.sum(1).tolist()):
            groups[tokens if self.cache.counts_padding else tokens > 1].append(number)
        return list(groups.values())

    def _answer(self, questions: list[str], wanted: dict[str, Any]) -> list[str]:
        inputs, cache = self.prepare(questions)
        output: Tensor = self.model.generate(  # type: ignore[operator]
            **inputs, **cache_argument(cache), **wanted
        )
        found = output[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in self._prompter.tokenizer.batch_decode(found, skip_special_tokens=True)]

    # -- on disk -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the compressed document to a folder; see `CompressedCache.save`.

        The text itself is not in it, but its tokens are.

        Raises:
            ConfigError: if the folder cannot be written, or holds a document or cache already.
        """
        about = {"ids": self._ids, "after": self._after, "vocabulary": self._prompter.vocabulary()}
        about["chat"] = self._prompter.chat
        self.cache.save(folder, overwrite=overwrite, extra={"document": about})

    @classmethod
    def load(cls, model: PreTrainedModel, processor: Any, folder: str | PathLike[str]) -> Document:
        """Reads a document that `save` wrote; its answers are those of the one that was saved.

        Args:
            model: the model it was saved from, in the same dtype; in any process, on any device.
            processor: its tokenizer or processor.
            folder: where it was saved.

        Raises:
            ConfigError: if the folder holds no document, a damaged one, or one of another model or tokenizer.
        """
        folder = path_of(folder, "folder")
        saved = loading.Saved.read(folder)
        cache, about = CompressedCache.from_saved(model, saved), saved.extra().get("document")
        if about is None:
            raise ConfigError(f"document {folder}: is a cache without a document; read it with CompressedCache.load")
        prompter = Prompter(model, processor, False)
        try:
            ids, after, vocabulary, prompter.chat = (about[name] for name in ("ids", "after", "vocabulary", "chat"))
            fits = isinstance(ids, Tensor) and isinstance(after, str) and ids.shape[1] == cache.get_seq_length()
        except (LookupError, TypeError):
            fits = False
        if not fits:
            raise ConfigError(f"document {folder}: is damaged; read the document again and save it")
        if vocabulary != prompter.vocabulary():
            raise ConfigError(
                f"document {folder}: was tokenized with another vocabulary; pass the tokenizer or processor that it "
                "was made with"
            )
        document = cls.__new__(cls)
        document.model, document._prompter, document.cache = model, prompter, cache
        document._ids, document._after = ids.to(model.device), after
        return document
