"""What the preset `auto` chooses, by what it sees of the first prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHORT = 128  # tokens: a prompt of at most so many is kept whole


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt before it is read.

    Attributes:
        tokens: of its longest row, padding left out.
        has_image: whether any row has an image token.
        repeats: whether questions come later, and the model can be asked to repeat the prompt before.
    """

    tokens: int
    has_image: bool
    repeats: bool = False

    @property
    def is_short(self) -> bool:
        """Whether compressing it saves nothing."""
        return self.tokens <= SHORT

    def __str__(self) -> str:
        """The facts in words."""
        asked = ", and nobody knows yet what will be asked" if self.repeats else ""
        return f"the first prompt has {self.tokens:,} tokens, {'some' if self.has_image else 'none'} of an image{asked}"


@dataclass(frozen=True)
class Candidate:
    """A preset, and what is set in it.

    Attributes:
        preset: its name.
        fields: of the configuration, that replace its own.
        because: why they are set; empty where nothing is.
    """

    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    because: str = ""


_QUANTIZED = "tokens leave by their place while decoding, since what is quantized cannot leave by its score or age"

# The first that goes together with what the user has set is taken.
TEXT = (
    Candidate("text"),
    Candidate(
        "text", {"evictor": {"name": "chunk", "length": 12, "granularity": "head", "decode": "fixed_point"}}, _QUANTIZED
    ),
    Candidate("streaming"),
)
_FIXED = {"evictor": {"name": "topk", "granularity": "head", "decode": "fixed_point"}}
_UNMERGED = "nothing is merged, since what is set leaves nothing to merge, or no scores to do it by"
IMAGE = (
    Candidate("image"),
    Candidate("image", {"merger": None}, _UNMERGED),
    Candidate("image", _FIXED, _QUANTIZED),
    Candidate("streaming"),
)
REPEATED = (Candidate("kvzip"), Candidate("kvzip", _FIXED, _QUANTIZED))
_FREE = {"budget": {"fraction": 0.3, "sink": 1, "recent": 1}}
_PROTECTED = "one first and one last token are protected, as of any image"
REPEATED_IMAGE = (
    Candidate("kvzip", _FREE, _PROTECTED),
    Candidate("kvzip", {**_FREE, **_FIXED}, f"{_PROTECTED}; {_QUANTIZED}"),
)


def candidates(prompt: Prompt) -> tuple[Candidate, ...]:
    """What suits a prompt, best first."""
    first = () if not prompt.repeats or prompt.is_short else REPEATED_IMAGE if prompt.has_image else REPEATED
    return first + (IMAGE if prompt.has_image else TEXT)


KINDS = (Prompt(2 * SHORT, False), Prompt(2 * SHORT, True))  # one prompt of each kind that there is
