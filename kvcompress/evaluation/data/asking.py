"""Questions that are asked after their context was compressed, as a reader who did not know them would have to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation.data.encoding import begun_answer, chat_of, followed_by, reader_of
from kvcompress.evaluation.data.sample import Sample
from kvcompress.evaluation.generation import make_cache
from kvcompress.evaluation.models import LoadedModel
from kvcompress.reuse import Document
from kvcompress.reuse.prompts import Prompter

Mode = Literal["seen", "unseen"]
MODES: tuple[Mode, ...] = ("seen", "unseen")


def check_mode(mode: str, samples: Iterable[Sample]) -> None:
    """Finds out whether samples can be asked that way.

    Args:
        mode: "seen": the cache is compressed once the whole prompt is read; "unseen": after the context alone.
        samples: the samples.

    Raises:
        ConfigError: if there is no such mode, or a sample has no context to be compressed before its question.
    """
    if mode not in MODES:
        raise ConfigError(f"question: must be {' or '.join(MODES)}; got '{mode}'")
    without = next((sample for sample in samples if not sample.has_context), None)
    if mode == "unseen" and without is not None:
        raise ConfigError(
            f"question: unseen compresses a context before its question is read, and sample '{without.name}' has "
            "neither a 'context' nor an image; give it one, or take seen"
        )


class Asker:
    """Asks about contexts that are compressed before any question is known.

    The compressed copy of the last context stays: questions that follow each other on one context are asked from it.
    """

    def __init__(self) -> None:
        self._asked: tuple[Sample, CompressionConfig] | None = None  # about what the document is, and how
        self._document: Document | None = None

    def ask(
        self, loaded: LoadedModel, sample: Sample, config: CompressionConfig | None
    ) -> tuple[dict[str, Tensor], Cache]:
        """What a model is given to answer a sample's question.

        Args:
            loaded: the model.
            sample: with a context, an image or both.
            config: how the context is compressed; None for the full cache.

        Returns:
            The prompt, and a cache that has read its beginning: a copy of the compressed context. The full cache comes
            empty and with the images, since it is the same whether the question was known.

        Raises:
            ConfigError: if the image cannot be read, or the configuration does not fit.
            UnsupportedModelError: if there is an image and the model sees none.
        """
        picture, begun = sample.open_picture(), begun_answer(loaded, sample)
        reader, chat = reader_of(loaded), chat_of(sample)
        images = [] if picture is None else [picture]
        if config is None:
            inputs, after = Prompter(loaded.model, reader, chat).document(sample.context, images)
            return followed_by(loaded, inputs, sample.question + after + begun), make_cache(loaded, None)
        if self._document is None or not self._is_about(loaded, sample, config):
            self._document = None  # two are never held at a time
            self._document = Document(loaded.model, reader, sample.context, images=images, config=config, chat=chat)
            self._asked = sample, config
        return self._document.prepare([sample.question], answer_prefix=begun)

    def _is_about(self, loaded: LoadedModel, sample: Sample, config: CompressionConfig) -> bool:
        assert self._document is not None and self._asked is not None
        before, same = self._asked[0], self._asked[1] == config and self._document.model is loaded.model
        return same and (
            (before.context, before.image) == (sample.context, sample.image) and before.picture is sample.picture
        )
