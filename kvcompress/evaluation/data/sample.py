"""One question with its answer, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError
from kvcompress.files import open_picture, read_picture

TEXT = "text"  # the kind of a sample that is plain text and its continuation, not a question


@dataclass(frozen=True)
class Sample:
    """A prompt, its reference answer, and its image.

    Attributes:
        name: stable and unique within the data.
        prompt: what the user says, a context at its beginning included.
        answer: the reference answer; None or empty where there is none.
        image: path of the image; None where there is none, or where it is drawn.
        picture: the image itself (PIL) where it is drawn.
        kind: what is asked for, such as "count" for ShapesLLaVA, "ocr+math" for MM-Vet; "text" for plain text, which
            goes to the model without a chat template; "" where the data tell no kinds apart.
        folder: where the image must lie once links are followed; None allows any place.
        context: the document that the prompt begins with, an empty line before the question; None where there is none.
        answer_prefix: what the answer begins with, put into the model's mouth; "" where it begins by itself.
        max_new_tokens: most tokens of a generated answer, where the data say so for this question.

    Raises:
        ConfigError: if the prompt does not begin with the context, or has no question after it.
    """

    name: str
    prompt: str
    answer: str | None
    image: Path | None = None
    picture: Any | None = None
    kind: str = ""
    folder: Path | None = field(default=None, compare=False)
    context: str | None = None
    answer_prefix: str = ""
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.context is not None and not (self.prompt.startswith(self.context) and self.context and self.question):
            raise ConfigError(
                f"sample '{self.name}': its prompt must begin with its context and go on with a question; build it as "
                "f'{context}\\n\\n{question}'"
            )

    @property
    def has_context(self) -> bool:
        """Whether something stands before the question: a document, an image, or both."""
        return self.context is not None or self.has_image

    @property
    def question(self) -> str:
        """The prompt without its context."""
        return self.prompt if self.context is None else self.prompt.removeprefix(self.context).strip()

    @property
    def has_image(self) -> bool:
        """Whether an image belongs to the prompt."""
        return self.image is not None or self.picture is not None

    def open_picture(self) -> Any | None:
        """The image as RGB (PIL); None for a sample without one.

        Raises:
            ConfigError: if its file is missing, no image, or lies outside of its folder.
            MissingDependencyError: if pillow is not installed.
        """
        if self.picture is not None or self.image is None:
            return self.picture
        return open_picture(self.image, self.folder)


def data_hash(samples: Iterable[Sample]) -> str:
    """A sha256 over the content of samples: names, prompts, answers, kinds, the bytes of images, what else is read.

    It is the same wherever the files lie. An image that is missing, or that `open_picture` would refuse for its place,
    its size or what kind of file it is, counts as missing.
    """
    digest = hashlib.sha256()
    for sample in samples:
        content: list[Any] = [sample.name, sample.prompt, sample.answer, sample.kind, _picture_hash(sample)]
        if sample.context is not None or sample.answer_prefix or sample.max_new_tokens is not None:
            content += [len(sample.context or ""), sample.answer_prefix, sample.max_new_tokens]
        line = json.dumps(content, ensure_ascii=False)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def with_unique_names(samples: Sequence[Sample]) -> list[Sample]:
    """Gives those whose name is empty or taken another: their number, or the name with a number."""
    taken: set[str] = set()
    again: dict[str, int] = {}  # the number to try next, so that n samples of one name take n tries
    found = []
    for index, sample in enumerate(samples):
        name = first = sample.name or str(index)
        while name in taken:
            again[first] = again.get(first, 1) + 1
            name = f"{first}#{again[first]}"
        taken.add(name)
        found.append(sample if name == sample.name else replace(sample, name=name))
    return found


def _picture_hash(sample: Sample) -> str | None:
    if sample.picture is not None:
        content = f"{sample.picture.mode} {sample.picture.size} ".encode() + sample.picture.tobytes()
    elif sample.image is not None:
        try:
            content = read_picture(sample.image, sample.folder)
        except ConfigError:
            return "missing"
    else:
        return None
    return hashlib.sha256(content).hexdigest()
